"""This module holds the kernels that the layer benchmark compares, each behind the same call, and random layers.

Every peer is a function of (x [tokens, hidden], weights float32 [tokens, top-k], ids int32 [tokens, top-k]). It names
the packed weights that it computes with, so that one reference checks all peers.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.kernels.routing import Shape, nearest_width
from benchmarks.kernels.trellis import beside, trellis_experts
from vllm_moeq.kernels import dense_expert, ragged
from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
MARLIN_TILE = 64
"""Marlin's intermediate sizes are multiples of this and of the group; vLLM pads others with zeros, and so do we."""
MARLIN_BLOCKS = 4
"""Locks per multiprocessor that Marlin may use."""

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class UnavailableError(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """The layer that peers are built for.

    Attributes:
        shape: the layer's shape.
        packed: the mixed-width layer.
        group_size: weights per scale.
        dtype: the activations' dtype.
        device: the device that holds everything.
    """

    shape: Shape
    packed: PackedExperts
    group_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def average(self) -> float:
        """Mean width of the experts."""
        return sum(self.packed.bits) / len(self.packed.bits)

    def uniform(self, width: int, **options: bool) -> PackedExperts:
        """Return a layer of the same shape whose experts all have one width."""
        bits = [width] * self.shape.experts
        return random_experts(bits, self.shape, self.group_size, self.device, **options)


@dataclass(frozen=True)
class Peer:
    """One kernel, ready to be called.

    Attributes:
        name: key of :data:`BUILDERS`.
        call: the layer.
        weights: the weights that it computes with.
        note: a remark for readers of the table.
        capture: False where a call waits for the device and so cannot be in a CUDA graph.
    """

    name: str
    call: Call
    weights: PackedExperts
    note: str = ""
    capture: bool = True


def random_matrices(
    bits: Sequence[int], rows: int, columns: int, group_size: int, device: torch.device, seed: int, *, symmetric: bool
) -> PackedMatrices:
    """Return matrices whose codes are random words, with weights of about variance 1/columns.

    Scales and zeros are exact in float16 and bfloat16 alike, so that backends which keep them in the activations'
    dtype compute with the same weights. ``symmetric``: the zero is 2^(bits−1), else the middle code or half a code
    below it.
    """
    layout = ragged(bits, rows, columns, group_size)
    generator = torch.Generator(device).manual_seed(seed)
    words = torch.empty(layout.num_words, dtype=torch.int32, device=device)
    words.random_(-(2**31), 2**31, generator=generator)
    steps = torch.tensor([2.0**width for width in bits], device=device)[:, None, None]
    shape = (len(bits), rows, layout.groups)
    factor = 0.75 + 0.5 * torch.rand(shape, generator=generator, device=device)
    scales = factor * (12.0 / columns) ** 0.5 / steps
    half = torch.randint(0, 2, shape, generator=generator, device=device) / 2
    zeros = torch.broadcast_to(steps / 2, shape) if symmetric else (steps - 1) / 2 - half
    return PackedMatrices(layout, words, scales.bfloat16().half(), zeros.half().contiguous())


def random_experts(
    bits: Sequence[int],
    shape: Shape,
    group_size: int,
    device: torch.device,
    *,
    symmetric: bool = False,
    intermediate: int | None = None,
) -> PackedExperts:
    """Return a layer of random codes; ``intermediate`` above the shape's own is padding that counts as zero."""
    inner = intermediate or shape.intermediate
    first = random_matrices(bits, 2 * inner, shape.hidden, group_size, device, 1, symmetric=symmetric)
    first.scales.view(len(bits), 2, inner, -1)[:, :, shape.intermediate :] = 0
    second = random_matrices(bits, shape.hidden, inner, group_size, device, 2, symmetric=symmetric)
    return PackedExperts(first, second)


def dense_weights(packed: PackedMatrices, dtype: torch.dtype) -> torch.Tensor:
    """Return all experts dequantized, [E, rows, columns]."""
    matrices = packed.matrices
    shape = (len(matrices.bits), matrices.rows, matrices.columns)
    result = torch.empty(shape, dtype=dtype, device=packed.words.device)
    for expert in range(len(matrices.bits)):
        result[expert] = dense_expert(matrices, expert, packed.words, packed.scales, packed.zeros, dtype)
    return result


def ours(backend: str, setting: Setting, packed: PackedExperts) -> Call:
    """Return a layer of this project.

    Its ``warm_up`` is left out: that compiles every variant, while a benchmark's points need a few of them, which
    the calls before the timing compile.
    """
    from vllm_moeq.format import UsageError
    from vllm_moeq.kernels.backends import make_layer

    try:
        return make_layer(packed, setting.dtype, backend)
    except UsageError as error:
        raise UnavailableError(str(error)) from error


def triton(setting: Setting) -> Peer:
    """Build our kernel: every width in one launch per projection."""
    return Peer("triton", ours("triton", setting, setting.packed), setting.packed)


def trellis(setting: Setting) -> Peer:
    """Build our kernel for trellises of 2 bits."""
    packed = trellis_experts([2] * setting.shape.experts, setting.shape, setting.device)
    return Peer("trellis-w2", ours("triton", setting, packed), packed, "all trellises of 2 bits")


def trellis_and_grid(setting: Setting) -> Peer:
    """Build our kernel for a layer of two codings, a trellis of 2 bits and a grid of 3."""
    half = setting.shape.experts // 2
    grids = random_experts([3] * (setting.shape.experts - half), setting.shape, setting.group_size, setting.device)
    packed = PackedExperts(beside(grids.gate_up, [2] * half, 3), beside(grids.down, [2] * half, 4))
    return Peer("trellis-w2-grid-w3", ours("triton", setting, packed), packed, "half trellises of 2 bits, half 3 bits")


def reference(setting: Setting) -> Peer:
    """Build plain torch, expert by expert."""
    return Peer("reference", ours("reference", setting, setting.packed), setting.packed, capture=False)


def humming_classes(setting: Setting) -> Peer:
    """Build one humming launch per width and projection."""
    return Peer("humming-classes", ours("humming", setting, setting.packed), setting.packed)


def humming_uniform(setting: Setting) -> Peer:
    """Build humming with every expert at the width nearest to the average."""
    width = nearest_width(setting.average)
    packed = setting.uniform(width)
    return Peer("humming-uniform", ours("humming", setting, packed), packed, f"all {width} bits")


def bf16(setting: Setting) -> Peer:
    """Build vLLM's fused MoE on the dequantized weights."""
    enter_vllm(setting)
    fused = vllm_module("fused_moe")
    w1 = dense_weights(setting.packed.gate_up, setting.dtype)
    w2 = dense_weights(setting.packed.down, setting.dtype)
    tuned = fused.get_moe_configs(setting.shape.experts, setting.shape.intermediate, None) is not None

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = fused.fused_experts(x, w1, w2, weights, ids)
        return result

    return Peer("bf16", call, setting.packed, "vLLM's tuned table" if tuned else "vLLM's defaults: no tuned table")


def marlin(setting: Setting) -> Peer:
    """Build vLLM's Marlin MoE: 4 bits, symmetric, as vLLM prepares a GPTQ checkpoint."""
    enter_vllm(setting)
    experts = vllm_module("experts.marlin_moe")
    utils = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    custom = importlib.import_module("vllm._custom_ops")
    kind = importlib.import_module("vllm.scalar_type").scalar_types.uint4b8
    if not hasattr(torch.ops._moe_C, "moe_wna16_marlin_gemm"):
        raise UnavailableError("this vLLM has no moe_wna16_marlin_gemm")
    unit = math.lcm(MARLIN_TILE, setting.group_size)
    inner = -(-setting.shape.intermediate // unit) * unit
    bits = [4] * setting.shape.experts
    packed = random_experts(bits, setting.shape, setting.group_size, setting.device, symmetric=True, intermediate=inner)

    def prepare(matrices: PackedMatrices) -> tuple[torch.Tensor, torch.Tensor]:
        layout = matrices.matrices
        codes = matrices.words.view(len(bits), layout.rows, layout.columns // 8).transpose(1, 2).contiguous()
        scales = matrices.scales.to(setting.dtype).transpose(1, 2).contiguous()
        words = custom.gptq_marlin_moe_repack(codes, layout.columns, layout.rows, 4)
        group = setting.group_size if layout.groups > 1 else -1
        return words, utils.marlin_moe_permute_scales(scales, layout.columns, layout.rows, group)

    (w1, s1), (w2, s2) = prepare(packed.gate_up), prepare(packed.down)
    locks = utils.marlin_make_workspace_new(setting.device, MARLIN_BLOCKS)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = experts.fused_marlin_moe(
            x, w1, w2, None, None, s1, s2, weights, ids, quant_type_id=kind.id, workspace=locks
        )
        return result

    padding = f", {setting.shape.intermediate} padded to {inner}" if inner != setting.shape.intermediate else ""
    return Peer("marlin-w4", call, packed, f"all 4 bits{padding}")


BUILDERS: dict[str, Callable[[Setting], Peer]] = {
    "triton": triton,
    "trellis-w2": trellis,
    "trellis-w2-grid-w3": trellis_and_grid,
    "bf16": bf16,
    "marlin-w4": marlin,
    "humming-uniform": humming_uniform,
    "humming-classes": humming_classes,
    "reference": reference,
}
GPU_PEERS = [name for name in BUILDERS if name != "reference"]
CPU_PEERS = ["triton", "trellis-w2", "trellis-w2-grid-w3", "reference"]


def vllm_module(name: str) -> Any:
    """Import one of vLLM's fused-MoE modules."""
    return importlib.import_module(f"{FUSED_MOE}.{name}")


@cache
def vllm_config() -> contextlib.ExitStack:
    """Make a default configuration vLLM's current one until the process ends: its kernels look at it."""
    config = importlib.import_module("vllm.config")
    stack = contextlib.ExitStack()
    stack.enter_context(config.set_current_vllm_config(config.VllmConfig()))
    return stack


def enter_vllm(setting: Setting) -> None:
    """Set vLLM up, or say why its kernels cannot run here."""
    if setting.device.type != "cuda":
        raise UnavailableError("vLLM's kernel needs a CUDA GPU")
    vllm_config()


def build(name: str, setting: Setting) -> Peer:
    """Build a peer.

    Raises:
        UnavailableError: its package is missing, or it does not run on this device or on this shape.
    """
    try:
        return BUILDERS[name](setting)
    except (ImportError, AttributeError, NotImplementedError) as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error
