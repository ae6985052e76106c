"""Scores of experts from weights alone, one file per metric."""

from planner.sensitivity.max_var import max_variance, max_variance_of_rows
from planner.sensitivity.router_norm import router_norm
from planner.sensitivity.spectrum import spectral_scores

__all__ = ["max_variance", "max_variance_of_rows", "router_norm", "spectral_scores"]
