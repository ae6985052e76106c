"""From scores to widths: order, counts per width, exact budgets. Pure functions."""

from planner.allocation.budget import solve_budget
from planner.allocation.levels import as_fraction, level_counts
from planner.allocation.order import rank_experts

__all__ = ["as_fraction", "level_counts", "rank_experts", "solve_budget"]
