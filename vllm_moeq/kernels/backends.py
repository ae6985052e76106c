"""Which kernel runs a layer."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.interface import LayerKernel, PackedExperts
from vllm_moeq.kernels.reference import ReferenceLayer

VARIABLE = "VLLM_MOEQ_BACKEND"
BACKENDS = ("auto", "triton", "humming", "native", "reference")


@dataclass(frozen=True)
class Choice:
    """A backend and why."""

    backend: str
    reason: str


def choose(packed: PackedExperts, requested: str = "auto") -> Choice:
    """Return the backend of a layer.

    Args:
        packed: the layer, on the device that runs it.
        requested: one of :data:`BACKENDS`.

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
    if triton_runs(device):
        return Choice("triton", "the layer is on a GPU")
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
