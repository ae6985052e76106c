"""The two halves of the paper's rule by themselves (its Table 2)."""

from planner.planning.method import Method, ascending, descending

ROUTER_NORM = Method(metrics=("router_norm",), order=ascending("router_norm"))
MAX_VAR = Method(metrics=("max_var",), order=descending("max_var"))
