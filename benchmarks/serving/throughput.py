"""This benchmark compares throughput and latency of real vLLM servers: a bfloat16 checkpoint and the quantized one.

    python benchmarks/serving/throughput.py --source benchmarks/models/stdlib-mixtral --output results

`moeq bench` measures a server in the same way, with random prompts. Here both servers get prompts from a text,
greedily, with a fixed number of new tokens and several numbers of requests at a time. They run one after the other on
the same machine. --check-dense adds a third server, for the quantized values as an ordinary bfloat16 checkpoint. Its
greedy tokens, requested with the OpenAI client, must equal ours up to near-ties. On a CPU the servers have all cores
and Intel's OpenMP, and run eagerly unless --compiled is given. On a GPU they are compiled and use CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # Python puts the script's own folder there

from benchmarks.common.cpu import all_cores
from benchmarks.common.results import environment
from planner.evaluation.serving_speed import METRICS, Endpoint, Load, better_by, measure
from planner.evaluation.vllm_server import NAME, Server, cpu_environment

MOEQ = "from planner.cli import main; main()"
FLAGS = ["--max-num-seqs", "32", "--dtype", "bfloat16", "--no-enable-prefix-caching"]
CHECKED_PROMPTS = 16
UNRANKED = 1e3
"""Nats reported where a difference cannot be told."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens of one prompt and, at each position, the best tokens' log-probabilities."""

    tokens: list[str]
    top: list[dict[str, float]]


def run(code: str, *arguments: object) -> None:
    """Run a line of Python with arguments in a child process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **cpu_environment()})


def cut(text: str, count: int, characters: int) -> list[str]:
    """Return prompts that begin evenly spaced over the text."""
    step = max(1, (len(text) - characters) // count)
    return [text[number * step : number * step + characters] for number in range(count)]


def requests(concurrency: int, per_client: int) -> int:
    """Return how many requests to send: enough for a median where there is one client."""
    return max(8, concurrency * per_client)


def measured(server: Server, args: argparse.Namespace, prompts: Path, concurrency: int) -> dict[str, Any]:
    """Send the requests to a running server and return the metrics."""
    load = Load(requests(concurrency, args.per_client), concurrency, output_tokens=args.new_tokens)
    flags = {
        "--dataset-name": "sharegpt", "--dataset-path": prompts, "--sharegpt-output-len": args.new_tokens
    }  # fmt: skip
    endpoint = Endpoint(server.url.removesuffix("/v1"), NAME)
    return {"concurrency": concurrency, **measure(endpoint, args.source, load, args.work, flags)}


def ask(server: Server, texts: Sequence[str], new_tokens: int) -> list[Answer]:
    """Return greedy answers with the log-probabilities of the best tokens."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url, api_key="none")
    answers = []
    for text in texts:
        reply = client.completions.create(
            model="model",
            prompt=text,
            max_tokens=new_tokens,
            temperature=0,
            logprobs=5,
            extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
        )
        found = reply.choices[0].logprobs
        if found is None or found.tokens is None or found.top_logprobs is None:
            raise RuntimeError(f"{server.folder}: the server returned no log-probabilities")
        answers.append(Answer(found.tokens, [dict(top) for top in found.top_logprobs]))
    return answers


def compare(ours: Sequence[Answer], dense: Sequence[Answer]) -> dict[str, Any]:
    """Compare answers up to each prompt's first difference: after it the texts are different ones.

    Returns:
        How many prompts agree to the end, and for the others where they part and by how many nats the two tokens
        differ there, the larger of both servers' opinions; UNRANKED where a token is not among a server's best.
    """
    parted = []
    for number, (mine, theirs) in enumerate(zip(ours, dense, strict=True)):
        pairs = enumerate(zip(mine.tokens, theirs.tokens, strict=True))
        place = next((position for position, (a, b) in pairs if a != b), None)
        if place is None:
            continue
        a, b = mine.tokens[place], theirs.tokens[place]
        missing = (math.inf, -math.inf)  # two missing tokens must not cancel out
        gaps = [abs(top.get(a, missing[0]) - top.get(b, missing[1])) for top in (mine.top[place], theirs.top[place])]
        parted.append({"prompt": number, "token": place, "gap": min(max(gaps), UNRANKED)})
    worst = max((item["gap"] for item in parted), default=0.0)
    return {"prompts": len(ours), "identical": len(ours) - len(parted), "worst_gap": worst, "parted": parted}


def server_for(name: str, folder: Path, args: argparse.Namespace) -> Server:
    """Return a server that is not started yet."""
    flags = [*FLAGS, "--max-model-len", str(args.max_model_len), *shlex.split(args.server_flags)]
    variables = cpu_environment()
    if not torch.cuda.is_available():
        variables |= all_cores()
        if not args.compiled:
            flags.append("--enforce-eager")
    return Server(folder, args.work / f"{name}.log", flags, variables, timeout=args.start_seconds)


def told(agreement: dict[str, Any]) -> str:
    """Return the comparison as one sentence."""
    return (
        f"Against the dense server with the same values: {agreement['identical']} of {agreement['prompts']} prompts "
        f"identical to the end, largest gap at a first difference {agreement['worst_gap']:.3f} nats."
    )


def markdown(result: dict[str, Any]) -> str:
    """Return the table: for each concurrency bf16, moeq, and how many times as good moeq is."""
    lines = ["# Serving", "", f"{result['device']}, {result['date']}: {result['source']} (bf16) against"]
    lines += [f"{result['quantized']} (moeq), {result['new_tokens']} new tokens a request.", ""]
    lines += ["| requests at a time | server | " + " | ".join(it.title for it in METRICS.values()) + " |"]
    lines += ["| ---: | --- " + "| ---: " * len(METRICS) + "|"]
    for base, ours in zip(result["bf16"], result["moeq"], strict=True):
        for name, row in (("bf16", base), ("moeq", ours)):
            values = " | ".join(f"{row[key]:.2f}" for key in METRICS)
            lines.append(f"| {row['concurrency']} | {name} | {values} |")
        better = " | ".join(f"{times:.2f}×" for times in better_by(ours, base).values())
        lines.append(f"| {base['concurrency']} | moeq better by | {better} |")
    if "agreement" in result:
        lines += ["", told(result["agreement"])]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Serve, measure, compare; 1 where tokens differ by more than a near-tie."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="bfloat16 checkpoint")
    parser.add_argument("--quantized", type=Path, help="its quantized folder; made in the output folder if left out")
    parser.add_argument("--avg-bits", default="2.5", help="where it is made")
    parser.add_argument("--bits", default="1,2,3", help="where it is made")
    parser.add_argument("--output", type=Path, required=True, help="folder for serving.json, serving.md and the logs")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--per-client", type=int, default=4, help="requests of each client; 8 in all at least")
    parser.add_argument("--text", type=Path, help="prompts are cut from it; default: held_out.txt of the source")
    parser.add_argument("--prompt-characters", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--server-flags", default="", help="further vLLM flags for every server, in one string")
    parser.add_argument("--compiled", action="store_true", help="compile on a CPU too, which takes minutes")
    parser.add_argument("--start-seconds", type=float, default=600, help="wait so long for a server")
    parser.add_argument("--check-dense", action="store_true", help="compare tokens with a dense server")
    parser.add_argument("--near-tie", type=float, default=0.25, help="nats that count as a tie at a first difference")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit must not leave a server behind
    args.work = args.output / "serving"
    args.work.mkdir(parents=True, exist_ok=True)
    quantized = args.quantized or args.work / "quantized"
    if not quantized.exists():
        run(MOEQ, "quantize", args.source, "-o", quantized, "--avg-bits", args.avg_bits, "--bits", args.bits)
    text = (args.text or args.source / "held_out.txt").read_text(encoding="utf-8")
    texts = cut(text, max(requests(each, args.per_client) for each in args.concurrency), args.prompt_characters)
    prompts = args.work / "prompts.json"
    prompts.write_text(json.dumps([{"conversations": [{"value": each}, {"value": "-"}]} for each in texts]))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**environment(device), "source": args.source.name, "quantized": quantized.name}
    result.update({"new_tokens": args.new_tokens, "bf16": [], "moeq": []})
    answers: dict[str, list[Answer]] = {}
    folders = {"moeq": quantized, "dense": args.work / "dense", "bf16": args.source}  # what must be right comes first
    if not args.check_dense:
        del folders["dense"]
    elif not folders["dense"].exists():
        run(MOEQ, "export", quantized, "-o", folders["dense"])
    for name, folder in folders.items():
        print(f"starting the {name} server", flush=True)
        with server_for(name, folder, args) as server:
            if args.check_dense and name != "bf16":
                answers[name] = ask(server, texts[:CHECKED_PROMPTS], args.new_tokens)
            if name == "dense":
                result["agreement"] = compare(answers["moeq"], answers["dense"])
                print(told(result["agreement"]), flush=True)
            else:
                result[name] = [measured(server, args, prompts, each) for each in args.concurrency]
        result.setdefault("log_lines", []).extend(
            line for line in server.log.read_text().splitlines() if "moeq" in line
        )
        (args.output / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "serving.md").write_text(markdown(result))
    print(markdown(result))
    return int(result.get("agreement", {}).get("worst_gap", 0.0) > args.near_tie)


if __name__ == "__main__":
    sys.exit(main())
