"""AlphaQ (arXiv 2606.04980): no text; experts whose spectra have heavy tails, and large weights, cost more to round."""

from collections.abc import Sequence

from planner.planning.method import CostTable, Method, Scores
from planner.sensitivity.spectrum import MATRICES, alpha_costs


def _costs(scores: Scores, widths: Sequence[int]) -> dict[str, CostTable]:
    """Return the sum over an expert's matrices; exponents are compared with the median of the same projection.

    The exponent depends on a matrix's shape, so matrices of one shape are compared.
    """
    slots = [(prefix, expert) for prefix, found in scores.items() for expert in range(len(found["alpha_gate"]))]
    sums = [[0.0] * len(widths) for _ in slots]
    for matrix in (name for name in MATRICES if f"alpha_{name}" in next(iter(scores.values()))):
        exponents, variances, sizes = (
            [scores[prefix][f"{name}_{matrix}"][expert] for prefix, expert in slots]
            for name in ("alpha", "variance", "weights")
        )
        for column, bits in enumerate(widths):
            costs = alpha_costs(exponents, variances, bits, [int(size) for size in sizes])
            for row, cost in zip(sums, costs, strict=True):
                row[column] += cost
    tables: dict[str, list[list[float]]] = {prefix: [] for prefix in scores}
    for (prefix, _), row in zip(slots, sums, strict=True):
        tables[prefix].append(row)
    return dict(tables)


METHOD = Method(metrics=("spectrum",), costs=_costs, scope="global")
