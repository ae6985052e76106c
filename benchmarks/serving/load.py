"""This test loads a real server with streaming clients, cancellations and nonsense, and checks answers and memory.

    python benchmarks/serving/load.py DIR --clients 64 --minutes 7

First each prompt is answered alone. Then all clients ask at random and greedily, and every answer that is read to its
end must be the same text. The server computes in float32, so that other tokens in the batch cannot decide a tie. The
exit status is 1 if an answer differs or fails, memory grows, or the server does not end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from openai import AsyncOpenAI, OpenAIError

from planner.evaluation.vllm_server import Server, cpu_environment

FLAGS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64", "--enforce-eager"]
# A cache of this size has been used all over within seconds; a larger one looks like a leak until it has.
FLAGS += ["--num-gpu-blocks-override", "256"]
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""oneDNN keeps 1024 compiled products by default, one for each number of tokens: half a GiB that fills for as long as
new numbers come, and would hide a leak."""
TOKENS = 24
SETTLED = 0.25
"""Share of the time after which the memory is taken as that of the start: caches and pools have filled."""
GROWTH = 0.01
"""Growth of memory from then to the end that still counts as flat."""

PATIENCE = 20.0
"""Seconds in which a server ends."""

JSON = {"Content-Type": "application/json"}
NONSENSE: list[tuple[str, bytes, tuple[int, ...]]] = [
    ("no JSON", b"{", (400, 422)),
    ("no object", b"[1, 2]", (400, 422)),
    ("not UTF-8", b'{"prompt": "\xff"}', (400, 422)),
    ("unknown model", b'{"model": "none", "prompt": "a"}', (404,)),
    ("negative length", b'{"model": "model", "prompt": "a", "max_tokens": -1}', (400, 422)),
    ("temperature of words", b'{"model": "model", "prompt": "a", "temperature": "hot"}', (400, 422)),
    ("token that is none", b'{"model": "model", "prompt": [999999999], "max_tokens": 1}', (400, 422)),
    ("too long", json.dumps({"model": "model", "prompt": "word " * 5000}).encode(), (400, 422)),
    ("nested deeply", b'{"model": "model", "prompt": ' + b"[" * 5000, (400, 422)),
]
"""Requests that the server must refuse: a name, the body, and the statuses that are right."""


@dataclass
class Found:
    """The events of a run, and memory in MiB by the server's processes, every ten seconds and at the end."""

    requests: int = 0
    answers: int = 0
    cancelled: int = 0
    malformed: int = 0
    mismatches: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    memory: list[dict[str, int]] = field(default_factory=list)
    seconds: float = 0.0
    shutdown_seconds: float = 0.0
    left_processes: int = 0


def members(session: int) -> list[int]:
    """Return the processes of a session that have not ended: a server and its workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def memory(session: int) -> dict[str, int]:
    """Return the resident MiB of each process of a session, shared pages divided among those that share them."""
    found: dict[str, int] = {}
    for process in members(session):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            name = Path(f"/proc/{process}/comm").read_text().strip()
        except OSError:
            continue
        pages = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        found[f"{name} {process}"] = pages >> 10
    return found


def prompts(text: str, count: int) -> list[str]:
    """Return pieces from all over a text, of different lengths."""
    step = len(text) // count
    return [text[i * step : i * step + 40 + 7 * (i % 16)] for i in range(count)]


async def answer(client: AsyncOpenAI, prompt: str, stop_after: int | None = None) -> str | None:
    """Stream an answer; None if it is cancelled after some pieces."""
    pieces: list[str] = []
    async with await client.completions.create(
        model="model",
        prompt=prompt,
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        async for chunk in stream:
            pieces.append(chunk.choices[0].text if chunk.choices else "")
            if stop_after is not None and len(pieces) >= stop_after:
                return None
    return "".join(pieces)


async def ask(url: str, number: int, expected: dict[str, str], until: float, found: Found) -> None:
    """Be one client: complete answers, cancellations, and now and then nonsense."""
    draw = random.Random(number)
    # A connection per request: the server closes idle ones, which a client notices only when it has asked again.
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as raw:
        # openai takes httpx's clients as well, though its types name httpx2's alone.
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=raw)  # type: ignore[arg-type]
        while time.monotonic() < until:
            found.requests += 1
            kind = draw.random()
            try:
                if kind < 0.1:
                    name, body, statuses = draw.choice(NONSENSE)
                    reply = await raw.post(f"{url}/completions", content=body, headers=JSON)
                    found.malformed += 1
                    if reply.status_code not in statuses:
                        found.unexpected[f"{name}: {reply.status_code}"] += 1
                    continue
                prompt = draw.choice(list(expected))
                text = await answer(client, prompt, draw.randint(1, TOKENS // 2) if kind < 0.35 else None)
                if text is None:
                    found.cancelled += 1
                else:
                    found.answers += 1
                    found.mismatches += text != expected[prompt]
            except (OpenAIError, httpx.HTTPError, OSError) as error:
                found.unexpected[f"{type(error).__name__}: {error!s:.60} ({error.__cause__!r:.60})"] += 1


async def watch(session: int, until: float, found: Found) -> None:
    """Note the memory again and again."""
    while time.monotonic() < until:
        found.memory.append(memory(session))
        await asyncio.sleep(min(10.0, max(0.0, until - time.monotonic())))


async def load(url: str, session: int, texts: list[str], clients: int, seconds: float) -> Found:
    """Answer each prompt alone, then all at once for some time."""
    found = Found()
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=300) as client:
        expected = {prompt: await answer(client, prompt) or "" for prompt in texts}
        again = {prompt: await answer(client, prompt) or "" for prompt in texts[:4]}
        found.mismatches += sum(expected[prompt] != text for prompt, text in again.items())
        began = time.monotonic()
        jobs = [ask(url, number, expected, began + seconds, found) for number in range(clients)]
        await asyncio.gather(watch(session, began + seconds, found), *jobs)
        found.seconds = time.monotonic() - began
        # What was cancelled is over: the server answers as at the start.
        found.mismatches += sum([await answer(client, prompt) != expected[prompt] for prompt in texts[:4]])
    found.memory.append(memory(session))
    return found


def run(folder: Path, text: str, clients: int, seconds: float, log: Path) -> Found:
    """Start a server, load it, end it."""
    with Server(folder, log, FLAGS, cpu_environment() | ENVIRONMENT) as server:
        found = asyncio.run(load(server.url, server.process, prompts(text, 32), clients, seconds))
        began = time.monotonic()
        os.kill(server.process, signal.SIGTERM)
        while members(server.process) and time.monotonic() < began + PATIENCE:
            time.sleep(0.05)
        found.shutdown_seconds = time.monotonic() - began
        found.left_processes = len(members(server.process))
    return found


def is_good(found: Found) -> bool:
    """Tell whether nothing unexpected happened."""
    totals = [sum(it.values()) for it in found.memory]
    flat = totals[-1] <= totals[int(SETTLED * len(totals))] * (1 + GROWTH)
    return flat and not found.mismatches and not found.unexpected and not found.left_processes and found.answers > 0


def main() -> None:
    """Print what was found, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a checkpoint of moeq with a tokenizer")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "models/stdlib-mixtral/held_out.txt")
    parser.add_argument("--log", type=Path, help="where the server's output goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        log = options.log or Path(temporary) / "log"
        found = run(options.folder, options.text.read_text(), options.clients, 60 * options.minutes, log)
    print(json.dumps(vars(found), indent=2))
    sys.exit(0 if is_good(found) else 1)


if __name__ == "__main__":
    main()
