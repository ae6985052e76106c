"""Our own rows: a plan, GPTQ, and the dequantized experts of the checkpoint."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import planner
from benchmarks.peers.asked import Asked
from benchmarks.peers.processes.job import PLACES
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.output.files import write_json, write_tensors
from vllm_moeq.format import ShardSet, expert_matrices, load_config, read_json

STATISTICS, SECONDS = "kl.safetensors", "kl-seconds.json"


def quantize_ours(asked: Asked, options: Mapping[str, Any], folder: Path, values: Path) -> dict[str, Any]:
    """Write the dequantized matrices of a checkpoint of ours.

    Args:
        asked: the model and the texts.
        options: keywords of ``planner.plan``, and ``calibration`` of ``planner.quantize``.
        folder: keeps the statistics, which all plans share.
        values: the file to write.

    Returns:
        Bits, seconds (statistics included) and versions.

    Raises:
        MoeqError: a damaged model or text.
    """
    before, given = 0.0, dict(options)
    calibration = given.pop("calibration", None)
    if given["method"] == "kl":
        before = _statistics(asked, folder)
        given["stats"] = folder / STATISTICS
    began, output = time.perf_counter(), values.parent / "checkpoint"
    plan = planner.plan(asked.model, **given)
    made = planner.quantize(
        asked.model, output=output, plan=plan, data=str(asked.data), samples=asked.samples, seq_len=asked.length,
        linear_bits=16, calibration=calibration,
    )  # fmt: skip
    seconds = before + time.perf_counter() - began
    found = _dequantized(asked.model, output)
    write_tensors(values, found)
    weights = sum(matrix.numel() for matrix in found.values())
    versions = {name: importlib.metadata.version(name) for name in ("vllm-moeq", "torch")}
    return {"total_bits": 8 * made.sizes.expert_bytes / weights, "seconds": seconds, "versions": versions}


def _statistics(asked: Asked, folder: Path) -> float:
    """Measure what plans of either scheme need, once; return the seconds that it took."""
    if not (folder / SECONDS).is_file():
        began = time.perf_counter()
        planner.calibrate(
            asked.model, output=folder / STATISTICS, methods=("kl",), data=str(asked.data), samples=asked.samples,
            seq_len=asked.length, scheme="trellis",
        )  # fmt: skip
        write_json(folder / SECONDS, time.perf_counter() - began)
    return float(read_json(folder / SECONDS))


def _dequantized(model: Path, checkpoint: Path) -> dict[str, Any]:
    """Return the experts of a checkpoint, ``layer.expert.place`` → float32."""
    config = load_config(checkpoint)
    places = dict(zip(config.projections.names(), PLACES, strict=True))
    with SourceModel(model) as source, ShardSet(checkpoint) as shards:
        layers = {layer.prefix: layer.index for layer in read_layout(source).layers}
        return {
            f"{layers[it.prefix]}.{it.expert}.{places[it.projection]}": it.dequantize(shards).float().contiguous()
            for it in expert_matrices(shards, config)
        }
