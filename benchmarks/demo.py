"""This demo quantizes a bfloat16 model twice, with and without a text, measures both and serves the better one.

make demo
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.common.shown import add_row
from planner.common.units import size
from planner.evaluation.vllm_server import Server, cpu_environment
from vllm_moeq.format import load_config

MODELS = Path(__file__).parent / "models"
PROMPT = 'def read(self, size=-1):\n    """Read up to size bytes from the'
TOKENS = 8192
"""Tokens of the held-out text that are measured."""


@dataclass(frozen=True)
class Way:
    """One way of quantizing.

    Attributes:
        name: its name for people.
        suffix: end of its folder's name.
        flags: flags of ``moeq quantize``.
    """

    name: str
    suffix: str
    flags: tuple[str, ...]


WAYS = (
    Way("the paper's rule, without a text", "rule", ("--bits", "1,2,3")),
    Way(
        "kl and GPTQ, with a text",
        "kl",
        ("--data", os.path.relpath(MODELS / "calibration.jsonl"), "--samples", "16", "--seq-len", "512"),
    ),
)


@dataclass(frozen=True)
class Measured:
    """What a folder takes and what it is worth; KL divergence is to the original, whose own is 0."""

    name: str
    folder: Path
    bits: float
    weight_bytes: int
    perplexity: float
    kl: float


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def moeq(console: Console, *arguments: str) -> None:
    """Show a command, and run it as a user would."""
    console.print(Text(f"\n$ moeq {' '.join(arguments)}", style="bold"), soft_wrap=True)
    subprocess.run([str(Path(sys.executable).with_name("moeq")), *arguments], check=True)


def quantize(console: Console, model: Path, way: Way, avg_bits: str, work: Path) -> Path:
    """Return the new folder of a model that is quantized in one way."""
    output = work / f"{model.name}-{avg_bits}bit-{way.suffix}"
    for old in (output, output.with_name(f"{output.name}.partial")):
        shutil.rmtree(old, ignore_errors=True)
    path = os.path.relpath(output)
    moeq(console, "quantize", os.path.relpath(model), "--avg-bits", avg_bits, *way.flags, "-o", path)
    moeq(console, "verify", path)
    return output


def evaluate(console: Console, model: Path, ways: Sequence[tuple[str, Path]], work: Path) -> list[Measured]:
    """Return what the original and the quantized folders are worth on the held-out text."""
    found, text = [], os.path.relpath(model / "held_out.txt")
    for name, folder in ways:
        result = work / f"{folder.name}.json"
        shutil.rmtree(result.with_name(f"{result.name}.partial"), ignore_errors=True)
        flags = ["--data", text, "--reference", os.path.relpath(model), "--max-tokens", str(TOKENS)]
        moeq(console, "eval", os.path.relpath(folder), *flags, "-o", os.path.relpath(result))
        facts = json.loads(result.read_text())
        bits = load_config(folder).plan.achieved_avg_bits
        found.append(Measured(name, folder, bits, folder_bytes(folder), facts["perplexity"], facts["kl"]["mean"]))
    original = Measured("the original, bfloat16", model, 16.0, folder_bytes(model), facts["reference_perplexity"], 0.0)
    return [original, *found]


def best(found: Sequence[Measured]) -> Measured:
    """Return the quantized folder that diverges least from the original, which is the first."""
    return min(found[1:], key=lambda it: it.kl)


def table(found: Sequence[Measured]) -> Table:
    """Return the folders side by side."""
    made = Table(title=f"held-out text, {TOKENS:,} tokens", title_justify="left")
    made.add_column("")
    for title in ("bits per expert weight", "weights on disk", "perplexity", "KL divergence, nats per token"):
        made.add_column(title, justify="right")
    for it in found:
        add_row(made, it.name, f"{it.bits:.3g}", size(it.weight_bytes), f"{it.perplexity:.2f}", f"{it.kl:.4f}")
    return made


def ask(server: Server) -> tuple[str, float]:
    """Return the greedy continuation of PROMPT and tokens per second of one request, warmed up."""
    client = OpenAI(base_url=server.url, api_key="none")
    client.completions.create(model="model", prompt=PROMPT, max_tokens=8, temperature=0)
    began = time.monotonic()
    answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=96, temperature=0)
    seconds = time.monotonic() - began
    assert answer.usage is not None
    return answer.choices[0].text, answer.usage.completion_tokens / seconds


def serve(console: Console, folder: Path, work: Path) -> None:
    """Serve a folder with vLLM, ask it once, stop it."""
    console.print(f"\nserving {os.path.relpath(folder)} with vLLM (it starts in about half a minute) …", soft_wrap=True)
    flags = ["--max-num-seqs", "8", "--enforce-eager"]
    with Server(folder, work / "server.log", flags, cpu_environment()) as server:
        console.print(f"POST {server.url}/completions")
        text, speed = ask(server)
    console.print(Text(PROMPT, style="dim") + Text(text), soft_wrap=True)
    console.print(f"{speed:.1f} tokens/s, one request; the server is stopped")


def main() -> None:
    """Run the whole job on the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "stdlib-mixtral")
    parser.add_argument("--work", type=Path, default=MODELS.parents[1] / ".demo")
    parser.add_argument("--avg-bits", default="2.5")
    args = parser.parse_args()
    console = Console(highlight=False)
    args.work.mkdir(exist_ok=True)
    ways = [(way.name, quantize(console, args.model, way, args.avg_bits, args.work)) for way in WAYS]
    found = evaluate(console, args.model, ways, args.work)
    chosen = best(found)
    moeq(console, "report", os.path.relpath(chosen.folder))
    console.print()
    console.print(table(found))
    serve(console, chosen.folder, args.work)


if __name__ == "__main__":
    main()
