"""The table of backends, and the choice of one for a layer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_moeq.format import GRID, TRELLIS_SCHEME, UsageError
from vllm_moeq.kernels.activations import SILU
from vllm_moeq.kernels.cpu import build
from vllm_moeq.kernels.interface import LayerKernel, PackedExperts
from vllm_moeq.kernels.reference_layer import ReferenceLayer

VARIABLE = "VLLM_MOEQ_BACKEND"
AUTO = "auto"
HALF = (torch.float16, torch.bfloat16)


class LinearKernel(Protocol):
    """A linear outside the experts, repacked for a backend.

    Attributes:
        weight: the matrix in the backend's order.
    """

    weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x · Wᵀ [..., N] in x's dtype, for x [..., K]."""
        ...


MakeLinear = Callable[[torch.Tensor, torch.Tensor, int], LinearKernel]
"""A function that repacks a linear from int32 words [N, K·b/32] with the zero point 2^(b−1), scales [N, K/G], and b."""


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: the value of :data:`VARIABLE` that selects it, and the ``name`` of its layers.
        problem: a function that returns why the backend does not run on a device, or an empty string if it does.
        make: a function that repacks a layer for activations of a dtype.
        automatic: the device types on which ``auto`` takes it; None means any.
        dtypes: the activation dtypes that it takes; None means any.
        schemes: the names of the schemes that it computes from; None means any.
        rotated: whether it computes from experts in a rotated basis.
        activations: whether it computes other activations than silu(gate)·up, and biases.
        any_call: whether a layer takes any of ``dtypes`` in each call, not only the dtype that it was made for.
        keeps_loaded: whether a layer computes from the loaded buffers; otherwise they are freed.
        captured: whether CUDA graphs can capture it; otherwise every call waits for the device.
        linear: a function that repacks linears outside the experts, or None if the backend has no kernel for them.
    """

    name: str
    problem: Callable[[torch.device], str]
    make: Callable[[PackedExperts, torch.dtype], LayerKernel]
    automatic: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None = HALF
    schemes: tuple[str, ...] | None = (GRID.name,)
    rotated: bool = False
    activations: bool = False
    any_call: bool = False
    keeps_loaded: bool = False
    captured: bool = True
    linear: MakeLinear | None = None

    def takes(self, dtype: torch.dtype) -> bool:
        """Tell whether activations may have this dtype."""
        return self.dtypes is None or dtype in self.dtypes


def _triton_problem(device: torch.device) -> str:
    """Return why Triton does not run here: it needs a GPU or its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is missing"
    if device.type != "cuda":
        from vllm_moeq.kernels.triton.layer import interpreted

        if not interpreted():
            return f"expected a GPU and the triton package, found device {device.type}"
    return ""


def _make_triton(packed: PackedExperts, dtype: torch.dtype) -> LayerKernel:
    from vllm_moeq.kernels.triton.layer import TritonLayer

    return TritonLayer(packed)


def _humming_problem(device: torch.device) -> str:
    from vllm_moeq.kernels import humming

    return "" if humming.available() else humming.MISSING


def _make_humming(packed: PackedExperts, dtype: torch.dtype) -> LayerKernel:
    from vllm_moeq.kernels.humming import HummingLayer

    return HummingLayer(packed, dtype)


def _native_problem(device: torch.device) -> str:
    return build.problem() if device.type == "cpu" else f"expected a CPU, found device {device.type}"


def _make_native(packed: PackedExperts, dtype: torch.dtype) -> LayerKernel:
    from vllm_moeq.kernels.cpu.layer import NativeLayer

    return NativeLayer(packed)


def _native_linear(words: torch.Tensor, scales: torch.Tensor, bits: int) -> LinearKernel:
    from vllm_moeq.kernels.cpu.linear import NativeLinear

    return NativeLinear(words, scales, bits)


TABLE = (
    Backend(
        "triton", _triton_problem, _make_triton, automatic=("cuda",), schemes=(GRID.name, TRELLIS_SCHEME.name),
        rotated=True, activations=True,
    ),
    Backend("humming", _humming_problem, _make_humming, automatic=()),
    Backend(
        "native", _native_problem, _make_native, automatic=("cpu",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16), schemes=(GRID.name, TRELLIS_SCHEME.name),
        rotated=True, activations=True, any_call=True, linear=_native_linear,
    ),
    Backend(
        "reference", lambda device: "", lambda packed, dtype: ReferenceLayer(packed), automatic=None,
        dtypes=None, schemes=None, rotated=True, activations=True, any_call=True, keeps_loaded=True, captured=False,
    ),
)  # fmt: skip
"""All backends in the order in which ``auto`` tries them; the last one runs everywhere, with any dtype and scheme."""

FALLBACK = TABLE[-1]
BACKENDS = (AUTO, *(row.name for row in TABLE))
"""The values of :data:`VARIABLE`."""


@dataclass(frozen=True)
class Choice:
    """A backend's name and the reason for choosing it."""

    backend: str
    reason: str

    @property
    def row(self) -> Backend:
        """The backend's row in the table."""
        return find(self.backend)


def requested_backend() -> str:
    """Return the backend that the environment asks for, unchecked."""
    return os.environ.get(VARIABLE, AUTO)


def find(name: str) -> Backend:
    """Return a backend's row in the table.

    Raises:
        UsageError: no backend has this name.
    """
    for row in TABLE:
        if row.name == name:
            return row
    raise UsageError(f"{VARIABLE}: expected one of {', '.join(BACKENDS)}, found {name}")


def choose(packed: PackedExperts, requested: str = AUTO, dtype: torch.dtype | None = None) -> Choice:
    """Choose the backend of a layer.

    Args:
        packed: the layer, on the device that runs it.
        requested: one of :data:`BACKENDS`.
        dtype: the activations' dtype; ``auto`` skips backends that do not take it. None skips none.

    Raises:
        UsageError: the backend is unknown, does not run on this device, or does not support the layer's schemes or
            activation.
    """
    device = packed.device
    if requested != AUTO:
        row = find(requested)
        if problem := row.problem(device):
            raise UsageError(f"{VARIABLE}={row.name}: {problem}")
        _require_schemes(row, packed)
        return Choice(row.name, f"{VARIABLE} asks for it")

    def obstacle(row: Backend) -> str:
        if unknown := _unknown_schemes(row, packed):
            return f"the {row.name} kernel does not take {unknown}"
        if packed.rotated and not row.rotated:
            return f"the {row.name} kernel does not take rotated experts"
        if other := _other_activation(row, packed):
            return f"the {row.name} kernel does not take {other}"
        if dtype is not None and not row.takes(dtype):
            return f"the {row.name} kernel does not take {dtype}"
        return row.problem(device)

    return choose_automatically(device, obstacle)


def choose_automatically(device: torch.device, obstacle: Callable[[Backend], str]) -> Choice:
    """Choose as ``auto`` does: the first backend for a kind of device that nothing stands in the way of.

    Args:
        device: the device that runs the layer.
        obstacle: a function that returns why a backend cannot be chosen, or an empty string if it can.
    """
    reason = f"no kernel runs on {device.type}"
    for row in TABLE:
        if row.automatic is None:
            return Choice(row.name, reason)
        if device.type not in row.automatic:
            continue
        if not (found := obstacle(row)):
            return Choice(row.name, f"the layer is on a {'CPU' if device.type == 'cpu' else 'GPU'}")
        reason = found
    raise AssertionError("the last row runs everywhere")


def _unknown_schemes(row: Backend, packed: PackedExperts) -> str:
    known = packed.schemes if row.schemes is None else row.schemes
    return ", ".join(name for name in packed.schemes if name not in known)


def _other_activation(row: Backend, packed: PackedExperts) -> str:
    """Return what the experts compute, where the backend does not; otherwise an empty string."""
    if row.activations or (packed.activation == SILU and not packed.biased):
        return ""
    return "biases" if packed.activation == SILU else str(packed.activation)


def _require_schemes(row: Backend, packed: PackedExperts) -> None:
    if unknown := _unknown_schemes(row, packed):
        known = " or ".join(row.schemes or ())
        raise UsageError(f"{VARIABLE}: the {row.name} kernel takes experts of the scheme {known}, found {unknown}")
    if packed.rotated and not row.rotated:
        raise UsageError(f"{VARIABLE}: the {row.name} kernel takes experts that are not rotated, found rotated ones")
    if other := _other_activation(row, packed):
        raise UsageError(f"{VARIABLE}: the {row.name} kernel takes experts with {SILU} and no biases, found {other}")


def choose_linear(requested: str = AUTO) -> tuple[Backend | None, str]:
    """Return the CPU backend for linears outside the experts, or None and the reason why there is none.

    Args:
        requested: one of :data:`BACKENDS`; a backend without a kernel for linears gives None.
    """
    reason = f"{VARIABLE} asks for it"
    for row in TABLE:
        if row.linear is not None and requested in (AUTO, row.name):
            reason = row.problem(torch.device("cpu"))
            if not reason:
                return row, ""
    return None, reason


def make_layer(packed: PackedExperts, dtype: torch.dtype, backend: str = AUTO) -> LayerKernel:
    """Repack a layer for a backend.

    Args:
        packed: the layer as loaded, on the device that runs it.
        dtype: the dtype of the activations.
        backend: one of :data:`BACKENDS`.

    Raises:
        UsageError: the backend is unknown, does not run here, or does not support this layer or dtype.
    """
    row = choose(packed, backend).row
    if row.dtypes is not None and dtype not in row.dtypes:
        names = " or ".join(str(it).removeprefix("torch.") for it in row.dtypes)
        raise UsageError(f"--dtype: the {row.name} kernels take {names}, found {dtype}")
    return row.make(packed, dtype)
