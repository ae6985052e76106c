"""Ours: one budget over the experts of all layers, spent where it lowers the KL divergence to the original most."""

from planner.methods.base import Method, measured

METHOD = Method(measures=("kl",), costs=measured("kl"), scope="global")
ESTIMATED = Method(measures=("kl-estimated",), costs=measured("kl_estimated"), scope="global")
