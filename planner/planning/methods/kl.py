"""Ours: one budget over the experts of all layers, spent where it lowers the KL divergence to the original most."""

from planner.planning.method import Method, measured

CHOICES = (1, 2, 3, 4)
"""Where experts differ much, four bits for some are worth one bit for others."""


def _method(measure: str, name: str) -> Method:
    return Method(
        measures=(measure,),
        costs=measured(name),
        calibrated_costs=measured(f"{name}_gptq"),
        scope="global",
        choices=CHOICES,
    )


METHOD = _method("kl", "kl")
ESTIMATED = _method("kl-estimated", "kl_estimated")
