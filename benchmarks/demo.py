"""This demo plans, quantizes, reports on, measures and serves a bfloat16 model, and asks it a question.

make demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.text import Text

from planner.common.progress import Progress
from planner.common.units import size
from planner.evaluation import perplexity
from planner.evaluation.vllm_server import Server, cpu_environment

HERE = Path(__file__).parent
PROMPT = 'def read(self, size=-1):\n    """Read up to size bytes from the'


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def moeq(*arguments: str) -> None:
    """Run the command as a user would."""
    subprocess.run([str(Path(sys.executable).with_name("moeq")), *arguments], check=True)


def ask(server: Server) -> tuple[str, float]:
    """Return the greedy continuation of PROMPT and tokens per second of one request, warmed up."""
    client = OpenAI(base_url=server.url, api_key="none")
    client.completions.create(model="model", prompt=PROMPT, max_tokens=8, temperature=0)
    began = time.monotonic()
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=96, temperature=0)
    seconds = time.monotonic() - began
    assert answer.usage is not None
    return answer.choices[0].text, answer.usage.completion_tokens / seconds


def main() -> None:
    """Run the whole job on the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "models" / "stdlib-mixtral")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".demo")
    parser.add_argument("--avg-bits", default="2.5")
    args = parser.parse_args()
    console = Console(highlight=False)
    quantized = args.work / f"{args.model.name}-{args.avg_bits}bit"
    args.work.mkdir(exist_ok=True)
    shutil.rmtree(quantized, ignore_errors=True)

    console.rule("plan and quantize")
    moeq("quantize", str(args.model), "--avg-bits", args.avg_bits, "--bits", "1,2,3", "-o", str(quantized))
    moeq("verify", str(quantized))
    before, after = folder_bytes(args.model), folder_bytes(quantized)
    console.print(f"on disk: {size(before)} → {size(after)}, {before / after:.2f} times smaller")
    moeq("report", os.path.relpath(quantized))

    console.rule("held-out perplexity")
    text = (args.model / "held_out.txt").read_text(encoding="utf-8")
    for name, folder in (("original", args.model), (f"{args.avg_bits} bits", quantized)):
        console.print(f"{name:>10}: {perplexity(folder, text, Progress(quiet=True)):.3f}")

    console.rule("serve with vLLM")
    console.print("starting the OpenAI server (about a minute on two cores) …")
    flags = ["--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    with Server(quantized, args.work / "server.log", flags, cpu_environment()) as server:
        console.print(f"POST {server.url}/completions")
        text, speed = ask(server)
    console.print(Text(PROMPT, style="dim") + Text(text), soft_wrap=True)
    console.print(f"{speed:.1f} tokens/s, one request; the server is stopped")


if __name__ == "__main__":
    main()
