"""Allocation methods, a file for each idea; a new one is a file and a row here."""

from planner.planning.method import LayerScores, Method, OrderOptions, Scores
from planner.planning.methods import (
    ablations,
    activation,
    alphaq,
    bsp,
    gemq,
    hessian,
    kl,
    paper,
    plain,
    pmq,
    slim,
)

METHODS: dict[str, Method] = {
    "kl": kl.METHOD,
    "kl-estimated": kl.ESTIMATED,
    "router-norm-maxvar": paper.METHOD,
    "router-norm": ablations.ROUTER_NORM,
    "max-var": ablations.MAX_VAR,
    "frequency": activation.FREQUENCY,
    "weight": activation.WEIGHT,
    "pmq": pmq.METHOD,
    "gemq": gemq.METHOD,
    "alphaq": alphaq.METHOD,
    "hessian": hessian.METHOD,
    "bsp": bsp.PREDICTED,
    "bsp-cosine": bsp.COSINE,
    "slim": slim.METHOD,
    "random": plain.RANDOM,
    "uniform": plain.UNIFORM,
}

UNRANKED = Method()
"""Gives widths by index: the same counts as any ranking, without reading a weight."""

PAPER = "router-norm-maxvar"
"""What ``auto`` stands for without calibration."""

OURS = "kl"
"""What ``auto`` stands for with it."""

__all__ = ["METHODS", "OURS", "PAPER", "UNRANKED", "LayerScores", "Method", "OrderOptions", "Scores"]
