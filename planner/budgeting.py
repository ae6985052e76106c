"""Widths that cost least within a budget, for methods that know what each width of each expert costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.allocation import solve_budget
from planner.methods import LayerScores, Method
from planner.options import PlanOptions
from vllm_moeq.format import UsageError

Slot = tuple[str, int]
Scores = Mapping[str, LayerScores]


def solve_group(
    slots: Sequence[Slot], total_bits: int, method: Method, scores: Scores, options: PlanOptions
) -> dict[Slot, int]:
    """Return the width of each expert that competes for ``total_bits``; overridden ones keep theirs.

    The method's least counts per width hold as far as the budget allows.

    Raises:
        UsageError: overrides that leave less than the lowest width for the others.
    """
    if method.costs is None:
        raise ValueError("expected a method with costs")
    choices = options.bit_choices
    fixed = {slot: options.overrides[name] for slot in slots if (name := f"{slot[0]}.{slot[1]}") in options.overrides}
    free = [slot for slot in slots if slot not in fixed]
    left = total_bits - sum(fixed.values())
    if left < choices[0] * len(free):
        raise UsageError(
            f"--overrides: the widths given leave {left} bits for {len(free)} experts, less than {choices[0]} each; "
            "raise --avg-bits or lower an override"
        )
    if not free:
        return fixed
    tables = {prefix: method.costs(scores[prefix], choices) for prefix, _ in slots}
    costs = [tables[prefix][expert] for prefix, expert in free]
    least = dict.fromkeys(choices[-method.kept_widths :], 1) if method.kept_widths else {}
    try:
        found = solve_budget(costs, choices, left, least)
    except ValueError:  # too few bits for one expert at each of those widths
        found = solve_budget(costs, choices, left)
    return fixed | dict(zip(free, found, strict=True))
