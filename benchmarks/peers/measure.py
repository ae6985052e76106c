"""Quantize by a row, and measure the result: one path for all peers, over a float32 copy of the model."""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import planner
from benchmarks.peers.asked import Asked
from benchmarks.peers.environments import Environments, FailedError, quantize
from benchmarks.peers.importance import write_importance
from benchmarks.peers.ours import quantize_ours
from benchmarks.peers.processes.job import Job
from benchmarks.peers.rows import OURS, PEERS, Row
from benchmarks.peers.storage import GROUP
from benchmarks.peers.subject import write_experts, write_with
from planner.calibration.reading.text import calibration_text
from planner.common.progress import Progress
from planner.model.source import SourceModel
from planner.output.files import write_tensors

EXPERTS, TOKENS, IMPORTANCE = "experts.safetensors", "tokens.safetensors", "importance.safetensors"


def prepare(asked: Asked, folder: Path, progress: Progress) -> None:
    """Write what the processes of all peers read: expert matrices, calibration text, importance.

    Raises:
        MoeqError: a damaged model or text.
    """
    if (folder / IMPORTANCE).is_file():
        return
    progress.line("reading the calibration text")
    tokens = calibration_text(asked.model, str(asked.data), asked.samples, asked.length, 0).tokens
    with SourceModel(asked.model) as model:
        write_experts(model, folder / EXPERTS)
        write_tensors(folder / TOKENS, {"tokens": tokens.contiguous()})
        write_importance(model, tokens, folder / IMPORTANCE)


def measure(row: Row, asked: Asked, folder: Path, environments: Environments) -> dict[str, Any]:
    """Return the result of a row.

    Raises:
        FailedError: the peer cannot be installed, or cannot quantize the model.
        MoeqError: what it gave does not fit the model.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        values = work / "values.safetensors"
        if row.peer == OURS:
            facts = quantize_ours(asked, row.options, folder, values)
        else:
            facts = _peer(row, asked, folder, values, environments)
        with SourceModel(asked.model) as model:
            write_with(model, values, work / "dense")
        found = planner.evaluate(
            work / "dense", data=asked.held_out, reference=asked.model, max_tokens=asked.max_tokens, save=False,
            output=work / "scores.json",
        ).text  # fmt: skip
    if found is None or found.kl is None:
        raise FailedError("the evaluation gave no KL divergence")
    kl = {"mean": found.kl.mean, "error": found.kl.error, "p99": found.kl.p99, "max": found.kl.max}
    scores = {"kl": kl, "perplexity": found.perplexity, "original": found.reference_perplexity, "tokens": found.tokens}
    return {"total_bits": row.storage.bits, **facts, **scores, "date": datetime.date.today().isoformat()}


def _peer(row: Row, asked: Asked, folder: Path, values: Path, environments: Environments) -> dict[str, Any]:
    """Have a peer write dequantized matrices; return seconds and versions."""
    peer = PEERS[row.peer]
    python = environments.python(row.peer, peer.requirements)
    experts, tokens, importance = (str(folder / name) for name in (EXPERTS, TOKENS, IMPORTANCE))
    job = Job(
        str(asked.model.resolve()), experts, tokens, importance, str(values), row.bits, GROUP, dict(row.options)
    )  # fmt: skip
    quantize(python, peer.module, job, values.with_name("job.json"), folder / f"{row.name}.log")
    facts: dict[str, Any] = json.loads(job.facts().read_text(encoding="utf-8"))
    return facts
