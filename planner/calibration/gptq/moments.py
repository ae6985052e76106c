"""Second moments of inputs, and how far outputs are from those of the original model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from planner.quantization.quantizers.hessian import NotPositiveDefiniteError
from planner.quantization.quantizers.target import Aim

SIDE = 256
"""Rows of moments that are summed at a time. A product of fewer does not reach the processor's rate."""


@dataclass(frozen=True)
class Inputs:
    """Some inputs of a linear.

    Attributes:
        own: its inputs x behind quantized layers [n, K].
        original: its inputs o in the original model for the same tokens; None to calibrate symmetrically.
        weights: how much each token counts, float32 [n]; None counts all alike.
        lost: what the outputs shall make up for besides, float32 [n, N]; None for nothing.
    """

    own: torch.Tensor
    original: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    lost: torch.Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Sums over tokens by their weights, divided by the number of tokens: float32 [K, K], or [B, K, K] for several.

    Attributes:
        second: sum of x·xᵀ.
        shift: sum of (o − x)·xᵀ; None to calibrate symmetrically.
        lost: sum of the lost outputs times xᵀ, [N, K] or [B, N, K], times :func:`trust`; None for nothing.
    """

    second: torch.Tensor
    shift: torch.Tensor | None
    lost: torch.Tensor | None = None

    @property
    def aim(self) -> Aim | None:
        """What several matrices with these moments aim at; None to calibrate symmetrically."""
        return None if self.shift is None else Aim(self.shift, self.lost)

    @classmethod
    def of(cls, parts: Iterable[Inputs]) -> Moments:
        """Return the moments of all parts.

        Raises:
            ValueError: there are no parts.
        """
        second = shift = lost = None
        rows, total, squares = 0, 0.0, 0.0
        for part in parts:
            x, weights = part.own.float(), part.weights
            second = _added_square(second, x, weights)
            if part.original is not None:
                shift = _added(shift, part.original.float() - x, x, weights)
            if part.lost is not None:
                lost = _added(lost, part.lost, x, weights)
                total += float(x.shape[0] if weights is None else weights.sum())
                squares += float(x.shape[0] if weights is None else weights.square().sum())
            rows += x.shape[0]
        if second is None:
            raise ValueError("no inputs")
        _mirror(second)
        if lost is not None:
            lost.mul_(trust(total**2 / squares if squares else 0.0, lost.shape[1]) / rows)
        return cls(second.div_(rows), None if shift is None else shift.div_(rows), lost)

    @classmethod
    def stack(cls, several: Iterable[Moments]) -> Moments:
        """Return the moments of several matrices as one."""
        found = list(several)
        return cls(
            torch.stack([one.second for one in found]),
            _stacked([one.shift for one in found]),
            _stacked([one.lost for one in found]),
        )

    def check(self) -> Moments:
        """Return the moments if they are finite.

        Raises:
            NotPositiveDefiniteError: they are not.
        """
        for part in (self.second, self.shift, self.lost):
            if part is not None and not bool(torch.isfinite(part).all()):
                raise NotPositiveDefiniteError("activations that are not finite")
        return self


def trust(tokens: float, columns: int) -> float:
    """Return the share of a regression on K columns that holds for other tokens than its own: 1 − K/n, at least 0.

    What the outputs lost is hardly a function of these inputs. As many inputs as tokens would fit anything, and all of
    it would be chance.

    Args:
        tokens: n, the number of tokens that count alike; of tokens with weights w it is (Σw)² / Σw².
        columns: K.
    """
    return max(0.0, 1 - columns / tokens) if tokens else 0.0


def _stacked(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.stack(known) if known else None


def _added(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    left = left if weights is None else left * weights[:, None]
    return left.mT @ right if total is None else total.addmm_(left.mT, right)


def _added_square(total: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Add the sum of x·xᵀ, in rows of blocks from the diagonal to the right; :func:`_mirror` fills the rest."""
    left, columns = x if weights is None else x * weights[:, None], x.shape[1]
    if total is None:
        total = x.new_zeros(columns, columns)
    for begin in range(0, columns, SIDE):
        total[begin : begin + SIDE, begin:].addmm_(left[:, begin : begin + SIDE].mT, x[:, begin:])
    return total


def _mirror(total: torch.Tensor) -> None:
    """Fill the blocks below the diagonal of a symmetric matrix."""
    for begin in range(SIDE, total.shape[0], SIDE):
        total[begin : begin + SIDE, :begin] = total[:begin, begin : begin + SIDE].mT
