"""Slim-LLM (Huang et al., ICML 2025): some groups of a matrix get one bit more, and as many others one bit less.

It serves comparisons only. The checkpoint format has one width per expert, so these functions return dequantized
weights, not codes. The method's salience-weighted search for scales is left out: at its published weight of 1 it
changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import kl_div, log_softmax

from planner.quantization.quantizers.base import Quantized, to_groups
from planner.quantization.quantizers.descent import Rounded, descend
from planner.quantization.quantizers.gptq import GptqSettings, quantize_gptq
from planner.quantization.quantizers.grid import LevelSearch, fit_group
from planner.quantization.quantizers.hessian import Factor, column_order, factorize
from vllm_moeq.format import WHOLE_ROW

WIDEST = 8

TOKENS = 1024
"""Number of inputs whose outputs are in memory at a time."""


def quantize_slim(
    weight: torch.Tensor,
    moments: torch.Tensor,
    inputs: torch.Tensor,
    bits: int,
    group_size: int,
    settings: GptqSettings,
) -> tuple[torch.Tensor, list[int]]:
    """Quantize one matrix by GPTQ with a width per group, ``bits`` on average.

    Args:
        weight: float [N, K].
        moments: Hessian, the mean of x·xᵀ over the inputs, float [K, K].
        inputs: a sample of the inputs, float [n, K]. It decides how many groups change their width. No group does
            without a sample (n = 0), or at 1 and 8 bits.
        bits: average width, 1 … 8.
        group_size: a multiple of 32 that divides K, or −1 for one group per row, which has ``bits``.
        settings: as for :func:`~planner.quantization.quantizers.gptq.quantize_gptq`; static groups and full
            ``act_order`` are not possible.

    Returns:
        The dequantized weights, float32 [N, K], and the width of each group in the order of the columns.

    Raises:
        CheckpointError: a weight is not finite, or K is not a multiple of 32 and of the group size.
        NotPositiveDefiniteError: ``moments`` stay unusable with any damping.
        ValueError: a width out of range, static groups, full ``act_order``, or inputs that are not finite.
    """
    if not 1 <= bits <= WIDEST:
        raise ValueError(f"expected 1 to {WIDEST} bits, got {bits}")
    if settings.static_groups or settings.act_order == "full":
        raise ValueError("widths per group need groups that are contiguous and not static")
    size = to_groups(weight, group_size).shape[2]
    order = column_order(moments.diagonal()[None], size, settings.act_order)[0]
    hessian = moments.float()[order][:, order][None]
    factor = factorize(hessian, settings.damping)
    ordered = weight.float()[:, order]
    widths = _choose_widths(ordered, factor.cost[0], inputs[:, order], bits, size, settings)
    result = torch.empty_like(ordered)
    result[:, order] = _solve(ordered, hessian, factor, widths, size, settings)
    width_of = dict(zip((order[::size] // size).tolist(), widths, strict=True))
    return result, [width_of[group] for group in range(len(widths))]


def group_salience(weight: torch.Tensor, cost: torch.Tensor, size: int) -> torch.Tensor:
    """Return the salience [K / G] of each group of ``size`` columns from weights [N, K] and costs [K], all float32.

    Salience is Σ W² / diag(R)². R is the upper Cholesky factor of the damped Hessian's inverse. In the terms of
    :class:`planner.quantization.quantizers.hessian.Factor`, R = d^(−1/2) · (I + U)⁻¹, so diag(R)⁻² is ``cost``.
    """
    return (weight.square().sum(dim=0) * cost).reshape(-1, size).sum(dim=1)


def _choose_widths(
    weight: torch.Tensor, cost: torch.Tensor, inputs: torch.Tensor, bits: int, size: int, settings: GptqSettings
) -> list[int]:
    """Return the width of each group: one bit more for the k most salient groups, one less for the k least salient."""
    ranking = group_salience(weight, cost, size).argsort(descending=True, stable=True)
    widths = torch.full_like(ranking, bits)
    if 1 < bits < WIDEST and len(ranking) > 1:
        grids = [settings.grid(width, "float") for width in (bits - 1, bits, bits + 1)]
        chosen = int(_divergences(weight, cost.reshape(-1, size), inputs, ranking, grids).argmin())
        widths[ranking[:chosen]] += 1
        widths[ranking.flip(0)[:chosen]] -= 1
    return [int(width) for width in widths]


def _divergences(
    weight: torch.Tensor, costs: torch.Tensor, inputs: torch.Tensor, ranking: torch.Tensor, grids: list[LevelSearch]
) -> torch.Tensor:
    """Return KL(softmax(Y_q) ‖ softmax(Y)), summed over the inputs, for k = 0 … groups // 2, float64.

    Each weight is rounded by itself, but on GPTQ's grids: on the plain range of a group, two bits look far worse than
    they are with GPTQ. From one k to the next, two groups change; only their part of the outputs is computed again.
    """
    groups, pairs = len(ranking), len(ranking) // 2
    blocks = weight.mT.reshape(groups, -1, weight.shape[0])
    more, less = ranking[:pairs], ranking.flip(0)[:pairs]
    same = _nearest(blocks, costs, grids[1])
    wider = _nearest(blocks[more], costs[more], grids[2]).sub_(same[more])
    narrower = _nearest(blocks[less], costs[less], grids[0]).sub_(same[less])
    result = torch.zeros(pairs + 1, dtype=torch.float64, device=weight.device)
    for part in inputs.split(TOKENS):
        x = part.float()
        exact, output = log_softmax(x @ weight.mT, dim=1), x @ same.flatten(0, 1)
        grouped = x.unflatten(1, (groups, -1))
        for k in range(pairs + 1):
            if k:
                output.addmm_(grouped[:, more[k - 1]], wider[k - 1]).addmm_(grouped[:, less[k - 1]], narrower[k - 1])
            result[k] += kl_div(exact, log_softmax(output, dim=1), reduction="sum", log_target=True)
    if not bool(torch.isfinite(result).all()):
        raise ValueError("expected finite inputs, found NaN or infinity")
    return result


def _nearest(blocks: torch.Tensor, cost: torch.Tensor, grid: LevelSearch) -> torch.Tensor:
    """Round each weight of groups [B, G, N] by itself; scales and zero points are not rounded for storage."""
    scale, zero = (found[:, None] for found in fit_group(blocks, cost, grid, torch.float32))
    codes = torch.addcdiv(zero, blocks, scale).round_().clamp_(0, grid.steps)
    return codes.sub_(zero).mul_(scale)


def _solve(
    weight: torch.Tensor, damped: torch.Tensor, factor: Factor, widths: list[int], size: int, settings: GptqSettings
) -> torch.Tensor:
    """Quantize [N, K] group by group and pass the errors on; return the dequantized weights.

    GPTQ solves each group as a problem of its own. The group's Hessian is the product of the factor's diagonal block.
    The group's weights include the corrections for the errors of earlier groups. The passes afterwards are over all
    groups, as GPTQ's are.
    """
    alone = replace(settings, act_order="none", damping=0.0, sweeps=0)  # already in order, already damped
    feedback, cost = factor.feedback[0], factor.cost[0]
    errors, found = torch.empty_like(weight), list[Quantized]()
    for group, width in enumerate(widths):
        begin = group * size
        inside = slice(begin, begin + size)
        unit = feedback[inside, inside].triu(1)
        unit.diagonal().fill_(1)
        due = errors[:, :begin] @ feedback[:begin, inside]
        # A correction in one column changes the next columns of the group: a triangular system.
        own = torch.linalg.solve_triangular(unit, due, upper=True, left=False, unitriangular=True)
        hessian = (unit * cost[inside]) @ unit.mT
        target = weight[:, inside] + own
        found += quantize_gptq(target[None], hessian[None], width, WHOLE_ROW, alone)
        errors[:, inside] = weight[:, inside] - found[-1].dequantize()
    rounded = Rounded(
        (errors @ (factor.feedback[0].triu(1) + torch.eye(errors.shape[1], device=errors.device))).mT[None],
        torch.cat([part.codes.mT for part in found])[None],
        torch.stack([part.scales[:, 0].float() for part in found])[None],
        torch.stack([part.zeros[:, 0].float() for part in found])[None],
        damped,
        factor,
        [settings.grid(width, "float") for width in widths],
        found[0].scales.dtype,
    )
    descend(rounded, settings.sweeps)
    return rounded.values()[0].mT
