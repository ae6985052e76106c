"""Quantize linears that are not routed experts: symmetric integers in compressed-tensors' packed format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from planner.quantization.quantizers.base import to_groups
from planner.quantization.quantizers.gptq import GptqSettings, quantize_gptq
from planner.quantization.quantizers.target import Aim
from vllm_moeq.format import CODES_PER_BLOCK, Linear, pack
from vllm_moeq.format.linears import SCALES, SHAPE, WORDS

CLIP_RATIOS = tuple(0.5 + 0.02 * i for i in range(31))
"""Candidate scales, relative to max|w| / (2^(b−1) − 1)."""


@dataclass(frozen=True)
class LinearQuantizerRow:
    """One quantizer of linears.

    Attributes:
        calibrated: whether it needs a calibration text.
    """

    calibrated: bool


LINEAR_QUANTIZERS = {"rtn": LinearQuantizerRow(calibrated=False), "gptq": LinearQuantizerRow(calibrated=True)}
"""Name → row: :func:`quantize_linear` and :func:`quantize_linears_gptq`."""

LINEAR_DEFAULT, LINEAR_DEFAULT_WITH_TEXT = "rtn", "gptq"


def default_linear_quantizer(calibrated: bool) -> str:
    """Return the name of the default quantizer of linears, by whether the experts' quantizer reads a text."""
    return LINEAR_DEFAULT_WITH_TEXT if calibrated else LINEAR_DEFAULT


def quantize_linear(weight: torch.Tensor, spec: Linear) -> dict[str, torch.Tensor]:
    """Quantize [N, K]. Each group takes the candidate scale with the least squared error.

    Returns:
        ``weight_packed`` int32 [N, K·b/32] (codes offset by 2^(b−1)), ``weight_scale`` in the weight's
        dtype [N, K / G], ``weight_shape`` int64 [2].

    Raises:
        CheckpointError: see :func:`planner.quantization.quantizers.base.to_groups`.
    """
    groups = to_groups(weight, spec.group_size)
    half = 2 ** (spec.bits - 1)
    dtype = _storage(weight)
    full = groups.abs().amax(dim=-1, keepdim=True) / (half - 1)
    best_scale = torch.ones_like(full, dtype=dtype)
    best_error = torch.full_like(full, float("inf"))
    for ratio in CLIP_RATIOS:
        scale = (full * ratio).to(dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = torch.round(groups / scale.float()).clamp_(-half, half - 1)
        error = (groups - codes * scale.float()).square().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    codes = torch.round(groups / best_scale.float()).clamp_(-half, half - 1) + half
    return {
        WORDS: pack(codes.flatten(1).to(torch.uint8), spec.bits),
        SCALES: best_scale[..., 0].contiguous(),
        SHAPE: torch.tensor(weight.shape, dtype=torch.int64),
    }


def quantize_linears_gptq(
    weights: Sequence[torch.Tensor],
    moments: torch.Tensor,
    aim: Aim | None,
    spec: Linear,
    settings: GptqSettings,
) -> list[dict[str, torch.Tensor]]:
    """Quantize linears that read the same inputs with GPTQ, to the format of :func:`quantize_linear`.

    Args:
        weights: float [N, K] each; N may differ.
        moments: mean of x·xᵀ over the inputs x, float32 [K, K].
        aim: see :func:`planner.quantization.quantizers.gptq.quantize_gptq`.
        spec: the width and the group size.
        settings: settings of GPTQ; zero points are in the middle of the codes whatever they say.

    Raises:
        CheckpointError: see :func:`planner.quantization.quantizers.base.to_groups`.
        NotPositiveDefiniteError: the moments stay unusable with any damping.
    """
    tuned = replace(settings, symmetric=True)
    dtypes = [_storage(weight) for weight in weights]
    together = torch.cat([weight.float() for weight in weights])
    found = quantize_gptq(
        together[None], moments[None].clone(), spec.bits, spec.group_size, tuned, aim=aim, storage=dtypes[0]
    )[0]
    rows = [weight.shape[0] for weight in weights]
    parts = zip(weights, found.codes.split(rows), found.scales.split(rows), dtypes, strict=True)
    return [
        {
            WORDS: pack(codes.contiguous(), spec.bits).cpu(),
            SCALES: scales.to(dtype).contiguous().cpu(),
            SHAPE: torch.tensor(weight.shape, dtype=torch.int64),
        }
        for weight, codes, scales, dtype in parts
    ]


def _storage(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of a linear's scales: its own where it is a half precision, else bfloat16."""
    return weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def linear_group_size(input_sizes: list[int]) -> int:
    """Return the largest group size of 128, 64 and 32 that fits if tensor parallelism splits K in four; else 32.

    Row-parallel linears are split along K, and a rank must hold whole groups. Real models get 128.
    """
    fits = [g for g in (128, 64, CODES_PER_BLOCK) if all(size % (4 * g) == 0 for size in input_sizes)]
    return fits[0] if fits else CODES_PER_BLOCK
