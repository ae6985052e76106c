"""Second moments of inputs, and how far the original model's inputs are from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from planner.quantization.quantizers.hessian import NotPositiveDefiniteError


@dataclass(frozen=True)
class Inputs:
    """Some inputs of a linear.

    Attributes:
        own: its inputs x behind quantized layers [n, K].
        original: its inputs o in the original model for the same tokens; None to calibrate symmetrically.
        weights: how much each token counts, float32 [n]; None counts all alike.
    """

    own: torch.Tensor
    original: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Sums over tokens by their weights, divided by the number of tokens: float32 [K, K], or [B, K, K] for several.

    Attributes:
        second: sum of x·xᵀ.
        shift: sum of (o − x)·xᵀ; None to calibrate symmetrically.
    """

    second: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def of(cls, parts: Iterable[Inputs]) -> Moments:
        """Return the moments of all parts.

        Raises:
            ValueError: there are no parts.
        """
        second = shift = None
        rows = 0
        for part in parts:
            x, weights = part.own.float(), part.weights
            second = _added(second, x, x, weights)
            if part.original is not None:
                shift = _added(shift, part.original.float() - x, x, weights)
            rows += x.shape[0]
        if second is None:
            raise ValueError("no inputs")
        return cls(second.div_(rows), None if shift is None else shift.div_(rows))

    @classmethod
    def stack(cls, several: Iterable[Moments]) -> Moments:
        """Return the moments of several matrices as one."""
        found = list(several)
        shifts = [one.shift for one in found if one.shift is not None]
        return cls(torch.stack([one.second for one in found]), torch.stack(shifts) if shifts else None)

    def check(self) -> Moments:
        """Return the moments if they are finite.

        Raises:
            NotPositiveDefiniteError: they are not.
        """
        for part in (self.second, self.shift):
            if part is not None and not bool(torch.isfinite(part).all()):
                raise NotPositiveDefiniteError("activations that are not finite")
        return self


def _added(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    left = left if weights is None else left * weights[:, None]
    return left.mT @ right if total is None else total.addmm_(left.mT, right)
