"""The measures of experts that calibration can take besides counts: a table with one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from planner.calibration.block_score import block_cosine, train_predictor
from planner.calibration.kl.divergence import MEASURED_TOKENS, Effort, divergences
from planner.calibration.kl.gains import Reach, Trial, gains, no_gains
from planner.calibration.kl.linears.costs import linear_costs, runs
from planner.calibration.kl.linears.estimated import ESTIMATING
from planner.calibration.kl.linears.gains import TRYING
from planner.calibration.kl.linears.measured import MEASURING
from planner.calibration.kl.others import TRYING as TRYING_OTHERS
from planner.calibration.kl.others import check_trellises, other_gains, tried_weights
from planner.calibration.kl.second_order import elementwise, second_order
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates
from planner.calibration.reading.routed import Routed
from planner.calibration.statistics import LINEARS, LayerStatistics
from planner.common.progress import Progress
from planner.model.layout import Layout
from planner.model.linear_groups import linear_groups
from planner.model.source import SourceModel

Found = dict[str, dict[str, torch.Tensor]]
"""Experts prefix → name → one value per expert; or :data:`LINEARS` → name → one value per group of linears."""

Facts = dict[str, float]
"""Facts about a measure for the JSON description of the statistics."""


Parts = Sequence[tuple[str, float]]
"""(name of the work in the progress, passes of the text through the model)."""

GAINING = "gains of GPTQ"
"""Name in the progress of the work of trying GPTQ."""

READING = "calibrating"
"""Name of the work of a measure that is taken while the model reads the text."""

COUNTING_PASSES = 2.0
"""Number of passes over a text to count routed tokens: one up to the experts, one to the next layer."""


@dataclass(frozen=True)
class MeasureInputs:
    """The inputs of a measure, after the model has read the text.

    Attributes:
        decoder: the model.
        store: the input of every layer and the last layer's output, for the sequences that :attr:`Measure.share` asks
            for.
        tokens: int64 [sequences, length].
        found: experts prefix → statistics of the whole text.
        widths: bit widths to round experts to.
        seed: seed of the random draws.
        progress: shows the progress.
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
    """One row of the table.

    Attributes:
        names: names of the values; ``{bits}`` stands for each width.
        run: computes the values once the model has read the text; None if they are taken while its layers run.
        layer: computes the values of a layer while the layers run, from its tokens with the outputs of its experts, the
            number of experts, and the seed. With neither function, the values come from
            :func:`planner.calibration.statistics.observe`.
        share: keep hidden states for one in this many sequences, given the model's layout; None keeps none.
        check: raises UsageError, before any computation, if this machine cannot compute the measure.
        parts: names under which the work shows its progress, in order, each with its cost in passes of the text through
            the model besides the pass that counts, by layout and number of tokens; measured on the shipped Mixtral.
        of_linears: whether the values are those of groups of linears, under :data:`LINEARS`, not those of experts.
        searched: number of weights for which a trellis of each width is searched.
    """

    names: tuple[str, ...]
    run: Callable[[MeasureInputs], tuple[Found, Facts]] | None = None
    share: Callable[[Layout], int] | None = None
    check: Callable[[SourceModel, Layout, torch.device], None] | None = None
    parts: Callable[[Layout, int], Parts] = lambda *_: ((READING, 1.0),)
    layer: Callable[[Routed, int, int], dict[str, torch.Tensor]] | None = None
    of_linears: bool = False
    searched: Callable[[Layout], int] = lambda _: 0

    def passes(self, layout: Layout, tokens: int) -> float:
        """Return the cost in passes of a text of some tokens through the model."""
        return sum(passes for _, passes in self.parts(layout, tokens))

    def sequences(self, layout: Layout, total: int) -> int:
        """Return the number of sequences, out of ``total``, to keep hidden states for."""
        return max(1, total // self.share(layout)) if self.share is not None else 0

    def all_names(self, widths: Sequence[int]) -> list[str]:
        """Return the names of the values for some widths."""
        return [name.format(bits=bits) for name in self.names for bits in (widths if "{bits}" in name else (0,))]


ESTIMATED_SHARE = 6
"""Compute gradients for one in this many sequences; the estimate then costs no more than PMQ's errors."""

SMALL = 1 << 30
"""A model is small if its routed experts have at most this many weights; cost hardly matters then."""


def _is_small(layout: Layout) -> bool:
    return sum(layer.num_experts * layer.weights_per_expert for layer in layout.layers) <= SMALL


def _share(layout: Layout) -> int:
    return 1 if _is_small(layout) else ESTIMATED_SHARE


def _divergence(run: MeasureInputs, name: str, effort: Effort, share: int) -> tuple[Found, Facts]:
    tokens = run.tokens[: max(1, len(run.tokens) // share)]
    scale = len(tokens) / len(run.tokens)
    weights = {prefix: layer.routing_weight.double() * scale for prefix, layer in run.found.items()}
    found, measured = divergences(run.decoder, run.store, tokens, weights, run.widths, effort, run.seed, run.progress)
    reach = Reach(_is_small(run.decoder.layout))
    found_gains = gains(run.decoder, run.store, len(tokens), run.widths, {"": Trial()}, reach, GAINING, run.progress)
    gained = found_gains[""] or no_gains(run.decoder, run.widths)
    named = {
        prefix: {f"{name}_{bits}": value for bits, value in table.items()}
        | {f"{name}_gptq_{bits}": value * gained[prefix][bits] for bits, value in table.items()}
        for prefix, table in found.items()
    }
    return named, {"measured": measured, "measured_tokens": effort.tokens, "estimated_tokens": tokens.numel()}


def _measured(run: MeasureInputs) -> tuple[Found, Facts]:
    """Measure the KL divergence if the model is small; otherwise only estimate it."""
    return _divergence(run, "kl", _effort(run), _share(run.decoder.layout))


def _effort(run: MeasureInputs) -> Effort:
    """Return the limit on measurements: a large model allows none."""
    return Effort.like_pmq(run.tokens, run.decoder, run.widths) if _is_small(run.decoder.layout) else Effort()


def _estimated(run: MeasureInputs) -> tuple[Found, Facts]:
    return _divergence(run, "kl_estimated", Effort(), ESTIMATED_SHARE)


def _linears(run: MeasureInputs, name: str, effort: Effort, share: int) -> tuple[Found, Facts]:
    tokens = run.tokens[: max(1, len(run.tokens) // share)]
    costs, measured = linear_costs(run.decoder, run.store, tokens, effort, run.seed, run.progress)
    return {LINEARS: {f"{name}_{key}": value for key, value in costs.items()}}, {"measured": measured}


def _measured_linears(run: MeasureInputs) -> tuple[Found, Facts]:
    return _linears(run, "kl", _effort(run), _share(run.decoder.layout))


def _estimated_linears(run: MeasureInputs) -> tuple[Found, Facts]:
    return _linears(run, "kl_estimated", Effort(), ESTIMATED_SHARE)


def _others(run: MeasureInputs) -> tuple[Found, Facts]:
    sequences = max(1, len(run.tokens) // _share(run.decoder.layout))
    small = _is_small(run.decoder.layout)
    gained = other_gains(run.decoder, run.store, sequences, run.widths, small, run.progress)
    named: Found = {}
    for name, layers in gained.items():
        for prefix, table in layers.items():
            named.setdefault(prefix, {}).update({f"gain_{name}_{bits}": value for bits, value in table.items()})
    return named, {}


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
"""Sequences for the trace estimate: a double backward pass costs some fifty forward passes."""


def _block(routed: Routed, experts: int, seed: int) -> dict[str, torch.Tensor]:
    """Return BSP's scores of a layer; all its experts have the same values."""
    cosines = block_cosine(routed.inputs, routed.outputs)
    predictor = train_predictor(routed.inputs, cosines, seed)
    scores = {"block_cosine": float(cosines.nanmean()), "block_score": predictor.score(routed.inputs)}
    return {name: torch.full((experts,), score) for name, score in scores.items()}


def check_measures(names: Iterable[str], model: SourceModel, layout: Layout, device: torch.device) -> None:
    """Check, before hours of work, that this machine can compute the measures.

    Raises:
        UsageError: it cannot; the message names what is missing.
    """
    for name in names:
        check = MEASURES[name].check
        if check is not None:
            check(model, layout, device)


def _kl_parts(layout: Layout, _tokens: int) -> Parts:
    if not _is_small(layout):
        return ESTIMATED_PARTS
    return (("gradients", 9.0), ("measuring KL", 12.0), ("measuring KL", 12.0), (GAINING, 3.0))


def _linear_parts(layout: Layout, tokens: int) -> Parts:
    """Return the work of measuring linears: a layer runs twice, as it does when it counts."""
    if not _is_small(layout):
        return ESTIMATED_LINEARS
    passes = COUNTING_PASSES * runs(linear_groups(layout), layout.num_layers) / layout.num_layers
    return ((MEASURING, passes * min(1.0, MEASURED_TOKENS / tokens)), (TRYING, 0.5))


ESTIMATED_LINEARS: Parts = ((ESTIMATING, 1.5), (TRYING, 0.1))
"""The work of an estimate of the KL divergence that linears add."""

ESTIMATED_PARTS: Parts = (("gradients", 1.5), (GAINING, 0.5))
"""The work of an estimate of the KL divergence."""

MEASURES: dict[str, Measure] = {
    "error": Measure(("error_{bits}",), parts=lambda *_: ((READING, 1.7),)),
    "block": Measure(("block_cosine", "block_score"), layer=_block),
    "kl": Measure(("kl_{bits}", "kl_gptq_{bits}"), _measured, _share, parts=_kl_parts),
    "kl-estimated": Measure(
        ("kl_estimated_{bits}", "kl_estimated_gptq_{bits}"), _estimated, lambda _: ESTIMATED_SHARE,
        parts=lambda *_: ESTIMATED_PARTS,
    ),
    "kl-linears": Measure(
        ("kl_{bits}", "kl_gptq_{bits}"), _measured_linears, _share, parts=_linear_parts, of_linears=True
    ),
    "kl-estimated-linears": Measure(
        ("kl_estimated_{bits}", "kl_estimated_gptq_{bits}"), _estimated_linears, lambda _: ESTIMATED_SHARE,
        parts=lambda *_: ESTIMATED_LINEARS, of_linears=True,
    ),
    "others": Measure(
        ("gain_trellis_{bits}", "gain_rotated_{bits}", "gain_viterbi_{bits}"), _others, _share, check_trellises,
        parts=lambda layout, _: ((TRYING_OTHERS, 7.0 if _is_small(layout) else 1.0),),
        searched=lambda layout: tried_weights(layout, _is_small(layout)),
    ),
    "gemq": Measure(("gemq_{bits}",), _gradient_error, lambda _: 1, parts=lambda *_: (("gradients", 9.0),)),
    "hessian": Measure(
        ("hessian_{bits}",), _hessian, check=_hessian_fits,
        parts=lambda *_: (("Hessian traces", 30.0), ("rounding experts", 1.0)),
    ),
}  # fmt: skip
