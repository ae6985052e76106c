"""What calibration can find out of experts besides counts, for the methods that ask for it: a table, one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.calibration.kl.divergence import Effort, divergences
from planner.calibration.kl.gains import gptq_gains
from planner.calibration.kl.second_order import elementwise, second_order
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.statistics import LayerStatistics
from planner.common.progress import Progress
from planner.model.layout import Layout
from planner.model.source import SourceModel

Found = dict[str, dict[str, torch.Tensor]]
"""Experts prefix → name → one value per expert."""

Facts = dict[str, float]
"""What the statistics' description says of a measure."""


@dataclass(frozen=True)
class MeasureInputs:
    """What a measure has to work with, when the model has read the text.

    Attributes:
        decoder: the model.
        store: the input of every layer and the last one's output, for as many sequences as :attr:`Measure.share` says.
        tokens: int64 [sequences, length].
        found: counts and sums over all of them.
        widths: to round experts to.
        seed: of whatever is drawn.
        progress: says how far it is.
    """

    decoder: Decoder
    store: HiddenStates
    tokens: torch.Tensor
    found: Mapping[str, LayerStatistics]
    widths: tuple[int, ...]
    seed: int
    progress: Progress


@dataclass(frozen=True)
class Measure:
    """One row.

    Attributes:
        names: of its values, ``{bits}`` standing for each width.
        run: finds them; None where they are gathered while the layers run.
        share: of how many sequences one has its hidden states between all layers read, given the model's layout; None
            where none are.
        check: raises UsageError, before anything is computed, where it cannot be found on this machine.
        passes: what it costs, in passes of the text through the model besides those of counting; measured on the
            shipped Mixtral.
    """

    names: tuple[str, ...]
    run: Callable[[MeasureInputs], tuple[Found, Facts]] | None = None
    share: Callable[[Layout], int] | None = None
    check: Callable[[SourceModel, Layout, torch.device], None] | None = None
    passes: Callable[[Layout], float] = lambda _: 1.0

    def sequences(self, layout: Layout, total: int) -> int:
        """Return of how many sequences the hidden states between all layers are read."""
        return max(1, total // self.share(layout)) if self.share is not None else 0

    def all_names(self, widths: Sequence[int]) -> list[str]:
        """Return the names for some widths."""
        return [name.format(bits=bits) for name in self.names for bits in (widths if "{bits}" in name else (0,))]


ESTIMATED_SHARE = 6
"""One in so many sequences has its gradient computed, which keeps the estimate within the cost of PMQ's errors."""

SMALL = 1 << 30
"""Weights of all routed experts of a model for which cost hardly matters."""


def _is_small(layout: Layout) -> bool:
    return sum(layer.num_experts * layer.weights_per_expert for layer in layout.layers) <= SMALL


def _share(layout: Layout) -> int:
    return 1 if _is_small(layout) else ESTIMATED_SHARE


def _divergence(run: MeasureInputs, name: str, effort: Effort, share: int) -> tuple[Found, Facts]:
    tokens = run.tokens[: max(1, len(run.tokens) // share)]
    scale = len(tokens) / len(run.tokens)
    weights = {prefix: layer.routing_weight.double() * scale for prefix, layer in run.found.items()}
    found, measured = divergences(run.decoder, run.store, tokens, weights, run.widths, effort, run.seed, run.progress)
    gains = gptq_gains(run.decoder, run.store, len(tokens), run.widths)
    named = {
        prefix: {f"{name}_{bits}": value for bits, value in table.items()}
        | {f"{name}_gptq_{bits}": value * gains[prefix][bits] for bits, value in table.items()}
        for prefix, table in found.items()
    }
    return named, {"measured": measured, "measured_tokens": effort.tokens, "estimated_tokens": tokens.numel()}


def _measured(run: MeasureInputs) -> tuple[Found, Facts]:
    """Measure where the model is small, and estimate where it is not."""
    small = _is_small(run.decoder.layout)
    effort = Effort.like_pmq(run.tokens, run.decoder, run.widths) if small else Effort()
    return _divergence(run, "kl", effort, _share(run.decoder.layout))


def _estimated(run: MeasureInputs) -> tuple[Found, Facts]:
    return _divergence(run, "kl_estimated", Effort(), ESTIMATED_SHARE)


def _gradient_error(run: MeasureInputs) -> tuple[Found, Facts]:
    terms = {"gemq": elementwise}
    sums = second_order(run.decoder, run.store, run.tokens, run.widths, terms, "text", run.seed, run.progress)
    names = [f"gemq_{bits}" for bits in run.widths]
    return {prefix: {name: every[name] for name in names} for prefix, (every, _) in sums.items()}, {}


def _hessian_fits(model: SourceModel, layout: Layout, device: torch.device) -> None:
    from planner.calibration.hessian_trace import check_memory

    check_memory(model, layout, device)


def _hessian(run: MeasureInputs) -> tuple[Found, Facts]:
    from planner.calibration.hessian_trace import hessian_costs, layer_traces, perturbations

    decoder, layout = run.decoder, run.decoder.layout
    tokens = run.tokens[:HESSIAN_SEQUENCES]
    traces = layer_traces(decoder.model, layout, tokens, decoder.device, run.progress, seed=run.seed)
    costs = hessian_costs(traces, perturbations(decoder.model, layout, run.widths, run.progress))
    found = {
        layer.prefix: {
            f"hessian_{bits}": torch.full((layer.num_experts,), cost / layer.num_experts)
            for bits, cost in costs[layer.prefix].items()
        }
        for layer in layout.layers
    }
    return found, {"sequences": len(tokens)}


HESSIAN_SEQUENCES = 16
"""On which traces are estimated: double backward passes cost some fifty times a forward pass."""


def check_measures(names: Iterable[str], model: SourceModel, layout: Layout, device: torch.device) -> None:
    """Refuse measures that this machine is too small for, before hours of work.

    Raises:
        UsageError: naming what is missing.
    """
    for name in names:
        check = MEASURES[name].check
        if check is not None:
            check(model, layout, device)


MEASURES: dict[str, Measure] = {
    "error": Measure(("error_{bits}",), passes=lambda _: 1.7),
    "block": Measure(("block_cosine", "block_score")),
    "kl": Measure(
        ("kl_{bits}", "kl_gptq_{bits}"), _measured, _share, passes=lambda layout: 34.0 if _is_small(layout) else 2.0
    ),
    "kl-estimated": Measure(
        ("kl_estimated_{bits}", "kl_estimated_gptq_{bits}"), _estimated, lambda _: ESTIMATED_SHARE, passes=lambda _: 2.0
    ),
    "gemq": Measure(("gemq_{bits}",), _gradient_error, lambda _: 1, passes=lambda _: 9.0),
    "hessian": Measure(("hessian_{bits}",), _hessian, check=_hessian_fits, passes=lambda _: 31.0),
}
