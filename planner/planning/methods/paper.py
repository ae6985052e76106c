"""The paper's rule: small router norm first, then those of unusually large variance (section 3.3)."""

from planner.allocation import rank_experts
from planner.planning.method import LayerScores, Method, OrderOptions


def _order(scores: LayerScores, _experts: int, options: OrderOptions) -> list[int]:
    return rank_experts(scores["router_norm"], scores["max_var"], options.zeta, options.promotion)


METHOD = Method(metrics=("router_norm", "max_var"), order=_order, promotes=True)
