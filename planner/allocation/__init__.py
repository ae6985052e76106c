"""From scores to widths: order, counts per width, exact budgets. Pure functions."""

from planner.allocation.budget import solve_budget, solve_items
from planner.allocation.knapsack import Item
from planner.allocation.levels import as_fraction, level_counts
from planner.allocation.order import rank_experts

__all__ = ["Item", "as_fraction", "level_counts", "rank_experts", "solve_budget", "solve_items"]
