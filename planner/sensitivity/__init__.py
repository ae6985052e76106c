"""Scores of experts, one file per metric."""

from planner.sensitivity.max_var import max_variance
from planner.sensitivity.router_norm import router_norm

__all__ = ["max_variance", "router_norm"]
