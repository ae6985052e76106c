"""This module finds the smallest widths without test error, uniform and mixed (the paper's Appendix A, Figure 6)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.replication.theory.model import Model, activation, counted, draw, gates
from planner.quantization.quantizers import quantize_rtn
from vllm_moeq.format import CODES_PER_BLOCK, WHOLE_ROW

WIDTHS = range(1, 9)
SEQUENCES = 4000
"""Test sequences with less prevalent tokens, and as many with more prevalent ones: both must be right, however rare."""


@dataclass(frozen=True)
class Bits:
    """Smallest widths without test error in one trained model; None: no uniform width of 1 to 8 is enough.

    Attributes:
        full_error: share of test sequences that the unquantized model gets wrong.
        high: b_h, of all experts alike.
        low: b_l, of the experts with the larger norm changes, while the others have ``high``.
        swapped: the reverse: of those with the smaller norm changes, while the others have ``high``.
    """

    full_error: float
    high: int | None
    low: int | None
    swapped: int | None

    @property
    def gap(self) -> int | None:
        """Return b_h − b_l."""
        return None if self.high is None or self.low is None else self.high - self.low

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self) | {"gap": self.gap}


def quantized(weight: Tensor, bits: int, ends: tuple[float, float] | None = None) -> Tensor:
    """Return a matrix [m, d] after eq. 2, one bin size per neuron (Section 4.2: per column of W_1).

    The quantizer takes multiples of 32 columns. Columns are added to that end: copies of others, which change no
    neuron's range, or ``ends`` of a wider range, which give all neurons the same bin size.
    """
    missing = 2 + -(weight.shape[1] + 2) % CODES_PER_BLOCK
    more = weight[:, :missing] if ends is None else torch.tensor(ends).repeat(missing // 2).expand(len(weight), -1)
    padded = torch.cat([weight, more], dim=1)
    return quantize_rtn(padded, bits, WHOLE_ROW).dequantize()[:, : weight.shape[1]]


def test_outputs(model: Model, equal: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return y times each expert's output on the test sequences: unquantized [k, B], of each width [widths, k, B]."""
    halves = [draw(model.setting, alpha, SEQUENCES, generator) for alpha in (0.0, 1.0)]
    tokens, labels = (torch.cat(parts) for parts in zip(*halves, strict=True))
    counts, outputs = counted(model.setting, tokens), []
    weights = [neurons @ model.vectors for neurons in model.neurons]
    widest = (min(float(weight.min()) for weight in weights), max(float(weight.max()) for weight in weights))
    ends = widest if equal else None
    for scores, weight, sign in zip(model.scores(), weights, model.signs, strict=True):
        tables = [weight, *(quantized(weight, bits, ends) for bits in WIDTHS)]
        sigma = torch.stack([activation(table @ model.vectors.T) for table in tables])
        best, gate = gates(scores, counts, model.setting.chosen)
        outputs.append(sign * labels * (sigma[:, best] @ gate))
    every = torch.stack(outputs, dim=1)
    return every[0], every[1:]


def smallest_widths(model: Model, norm_change: Tensor, equal: bool, generator: torch.Generator) -> Bits:
    """Search b_h and b_l; per class the half of the experts with the smallest Λ [k] keep b_h (κ = γ = ½).

    With ``equal`` all neurons have the widest one's range: Theorem 4.4 supposes variances equal up to a constant.
    """
    full, by_width = test_outputs(model, equal, generator)
    keep = torch.zeros(len(norm_change), dtype=torch.bool)
    for sign in (1, -1):
        group = torch.nonzero(model.signs == sign).flatten()
        keep[group[norm_change[group].argsort()[: len(group) // 2]]] = True

    def right(first: int, second: int) -> bool:
        """Say whether no test sequence is wrong with ``first`` bits for those that keep, ``second`` for the others."""
        outputs = torch.where(keep[:, None], by_width[WIDTHS.index(first)], by_width[WIDTHS.index(second)])
        return bool((outputs.sum(dim=0) > 0).all())

    high = next((bits for bits in WIDTHS if right(bits, bits)), None)
    error = float((full.sum(dim=0) <= 0).float().mean())
    if high is None:
        return Bits(error, None, None, None)
    low, swapped = next(b for b in WIDTHS if right(high, b)), next(b for b in WIDTHS if right(b, high))
    return Bits(error, high, low, swapped)
