"""The order of experts: router norm first, then promotion by MaxVar (paper, section 3.3, step 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

Promotion = Literal["official", "stable"]


def rank_experts(
    router_norms: Sequence[float],
    max_variances: Sequence[float],
    zeta: float = 3.0,
    promotion: str = "official",
) -> list[int]:
    """Order experts from the highest precision to the lowest.

    Smaller router norms (or changes of norm) come first. Then MaxVar promotes experts: an expert moves in front of the
    first expert before it whose MaxVar, times ζ, is smaller than its own. One pass suffices: v_s > ζ·v_u is transitive
    for ζ >= 1.

    Args:
        router_norms: score per expert; equal scores keep the experts' order.
        max_variances: MaxVar per expert, >= 0.
        zeta: ζ >= 1; 1 sorts by descending MaxVar.
        promotion: order in which experts are visited; it decides the order among several promoted ones. ``official``:
            from the largest norm up, as in the authors' code. ``stable``: from the smallest norm down, which keeps the
            router order among the promoted.

    Returns:
        A permutation of range(len(router_norms)).

    Raises:
        ValueError: lengths differ, ζ < 1, an unknown promotion, or a value that is not finite.
    """
    if promotion not in get_args(Promotion):
        raise ValueError(f"promotion must be one of {get_args(Promotion)}, got {promotion!r}")
    norms = np.asarray(router_norms, dtype=np.float64)
    variances = np.asarray(max_variances, dtype=np.float64)
    if norms.ndim != 1 or norms.shape != variances.shape:
        raise ValueError(f"expected as many variances as norms, got {variances.shape} and {norms.shape}")
    if not (np.isfinite(norms).all() and np.isfinite(variances).all()):
        raise ValueError("router norms and variances must be finite")
    if not zeta >= 1:
        raise ValueError(f"zeta must be at least 1, got {zeta}")

    by_norm = np.argsort(norms, kind="stable")
    order = by_norm.copy()
    for expert in by_norm[::-1] if promotion == "official" else by_norm:
        position = int(np.flatnonzero(order == expert)[0])
        overtaken = np.flatnonzero(zeta * variances[order[:position]] < variances[expert])
        if overtaken.size:
            first = int(overtaken[0])
            order[first + 1 : position + 1] = order[first:position]
            order[first] = expert
    return [int(expert) for expert in order]
