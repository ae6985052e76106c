"""HAWQ-v2 (Dong et al., 2020): one width per layer, by the trace of the loss's Hessian times the error of rounding."""

from planner.planning.method import Method, measured

METHOD = Method(measures=("hessian",), costs=measured("hessian"), scope="global", layerwise=True)
