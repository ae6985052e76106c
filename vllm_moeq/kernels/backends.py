"""Which kernel runs a layer."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.interface import LayerKernel, PackedExperts
from vllm_moeq.kernels.reference import ReferenceLayer

VARIABLE = "VLLM_MOEQ_BACKEND"
BACKENDS = ("auto", "triton", "humming", "native", "reference")
MEASURED = Path(__file__).with_name("measured.json")
"""Backends that were measured to be the fastest, by GPU and layer: rows of :class:`Measurement`."""


@dataclass(frozen=True)
class Choice:
    """A backend and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Measurement:
    """The fastest backend of one layer on one GPU, over decode and prefill together.

    A layer keeps its weights in one backend's order, so the choice is per layer, not per batch; each backend picks
    its own schedule by the number of tokens.
    """

    gpu: str
    experts: int
    hidden: int
    intermediate: int
    widths: tuple[int, ...]
    backend: str


def read_measurements(path: Path = MEASURED) -> list[Measurement]:
    """Read the table; no file is no measurements."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())
    return [Measurement(**{**row, "widths": tuple(row["widths"])}) for row in rows]


def choose(packed: PackedExperts, requested: str = "auto", measurements: list[Measurement] | None = None) -> Choice:
    """Return the backend of a layer.

    Args:
        packed: the layer, on the device that runs it.
        requested: one of :data:`BACKENDS`.
        measurements: the table, by default the file beside this module.

    Raises:
        UsageError: an unknown backend, or one that does not run on this device.
    """
    if requested not in BACKENDS:
        raise UsageError(f"{VARIABLE}: expected one of {', '.join(BACKENDS)}, found {requested}")
    device = packed.gate_up.words.device
    if requested != "auto":
        if requested == "triton" and not triton_runs(device):
            raise UsageError(f"{VARIABLE}=triton: expected a GPU and the triton package, found device {device.type}")
        if requested == "native" and (device.type != "cpu" or build.problem()):
            raise UsageError(f"{VARIABLE}=native: {build.problem() or f'expected a CPU, found device {device.type}'}")
        return Choice(requested, f"{VARIABLE} asks for it")
    if device.type == "cpu":
        return Choice("reference", build.problem()) if build.problem() else Choice("native", "the layer is on a CPU")
    if device.type != "cuda":
        return Choice("reference", f"no kernel runs on {device.type}")
    gpu = torch.cuda.get_device_name(device)
    for row in read_measurements() if measurements is None else measurements:
        same = (row.experts, row.hidden, row.intermediate) == (len(packed.bits), packed.hidden, packed.intermediate)
        if row.gpu == gpu and same and row.widths == tuple(sorted(set(packed.bits))):
            return Choice(row.backend, f"measured fastest on {gpu}")
    if triton_runs(device):
        return Choice("triton", f"no measurement of this layer on {gpu}")
    return Choice("reference", "the triton package is missing")


def triton_runs(device: torch.device) -> bool:
    """Say whether the triton backend can run here: on a GPU, or anywhere under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return True
    from vllm_moeq.kernels.triton.layer import interpreted

    return interpreted()


def make_layer(packed: PackedExperts, dtype: torch.dtype, backend: str = "auto") -> LayerKernel:
    """Repack a layer for a backend.

    Args:
        packed: the layer as loaded, on the device that runs it.
        dtype: of the activations.
        backend: one of :data:`BACKENDS`.

    Raises:
        UsageError: the backend is unknown, does not run here, or cannot express this layer.
    """
    name = choose(packed, backend).backend
    if name == "reference":
        return ReferenceLayer(packed)
    if name == "native":
        from vllm_moeq.kernels.cpu.layer import NativeLayer

        return NativeLayer(packed)
    if dtype not in (torch.float16, torch.bfloat16):
        raise UsageError(f"--dtype: the {name} kernels take float16 or bfloat16, found {dtype}")
    if name == "humming":
        from vllm_moeq.kernels.humming import HummingLayer

        return HummingLayer(packed, dtype)
    from vllm_moeq.kernels.triton.layer import TritonLayer

    return TritonLayer(packed)
