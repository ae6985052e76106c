"""GEMQ (arXiv 2605.23078): one budget, spent by output errors weighted with squared gradients of the loss.

Its fine-tuning of the routers afterwards is not part of the allocation, and not done here.
"""

from planner.planning.method import Method, measured

METHOD = Method(measures=("gemq",), costs=measured("gemq"), scope="global")
