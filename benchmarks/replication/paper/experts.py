"""This part shows how experts react to the held-out text: the paper's Figures 10 (activations) and 11 (tokens)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.replication.paper.common import Bench, Result, by_layer, markdown_table
from planner.calibration.reading.decoder import Decoder, compute_dtype
from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.routed import Routed, finish, first_hidden, route
from planner.evaluation.scores import windows
from planner.model.layout import MoeLayer
from planner.sensitivity import router_norm

TOP = 256
"""Tokens of an expert with the highest gating values, over which activations are averaged."""

ENOUGH = 16
"""Tokens without which an expert does not take part in a correlation."""

SHOWN = 12
"""Tokens of an expert that are printed."""

AROUND = 8
"""Neighbours that are printed on each side."""

VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "`": "ˋ", "|": "¦"})
"""Whitespace that can be seen, and stand-ins for what ends a cell or a code span of a Markdown table."""


@dataclass
class View:
    """An expert on the held-out text.

    Attributes:
        norm: norm of its router.
        tokens: number of tokens that chose it.
        positions: positions of the tokens with the highest gating values, highest first.
        gates: their gating values.
        activations: mean |a| over the inputs a of the down projection, for each of those tokens.
    """

    norm: float
    tokens: int
    positions: list[int]
    gates: list[float]
    activations: list[float]


def views(bench: Bench, ids: Sequence[int], last: int | None = None) -> dict[int, list[View]]:
    """Return layer → experts, as the original model reads the held-out text.

    Args:
        bench: the model.
        ids: tokens of the text.
        last: layer behind which to stop, if not the last one.
    """
    tokens, _ = windows(ids, bench.asked.window)
    decoder = Decoder(bench.model, bench.layout, bench.device, compute_dtype(bench.device))
    found: dict[int, list[View]] = {}
    with TemporaryDirectory(dir=bench.output) as temporary:
        store = first_hidden(decoder, tokens, Path(temporary))
        for index in range(len(decoder) if last is None else last + 1):
            hidden, layer, outputs = store.load(index), decoder.moe.get(index), None
            if layer is not None:
                routed = route(decoder, index, hidden, store)
                found[index] = _look(decoder, layer, routed, len(ids) - 1)
                outputs = routed.outputs
            finish(decoder, index, hidden, store.create(index + 1), outputs)
            store.complete(index + 1)
            store.drop(index)
    return found


def _look(decoder: Decoder, layer: MoeLayer, routed: Routed, known: int) -> list[View]:
    """Return a layer's experts and add their outputs; positions from ``known`` on only fill the last window."""
    norms = router_norm(decoder.model.shards.load(layer.router))
    found = []
    for expert in range(layer.num_experts):
        weights = load_expert(decoder.model, layer, expert, decoder.device, decoder.dtype)
        gates, activations, positions = [torch.empty(0)], [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
        for inputs, share, places in routed.chunks(expert, decoder.device):
            inner = weights.inner(inputs, decoder.activation)
            routed.add(places, weights.outputs(inner).float() * share[:, None])
            gates.append(share.float().cpu())
            activations.append(inner.float().abs().mean(dim=1).cpu())
            positions.append(places)
        place = torch.cat(positions)
        gate, activation = (torch.cat(parts)[place < known] for parts in (gates, activations))
        place = place[place < known]
        top = gate.argsort(descending=True, stable=True)[:TOP]
        found.append(View(norms[expert], len(place), place[top].tolist(), gate[top].tolist(), activation[top].tolist()))
    return found


def _tokens(bench: Bench) -> tuple[object, list[int]]:
    """Return the tokenizer and the held-out text's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.folder)
    return tokenizer, tokenizer(bench.text, verbose=False)["input_ids"][: bench.asked.max_tokens]


def figure10(bench: Bench) -> Result:
    """Do experts of larger router norm have larger activations on the tokens that they are for?"""
    _, ids = _tokens(bench)
    layers = views(bench, ids)
    rows, body = [], []
    for index, experts in layers.items():
        ranked = sorted(range(len(experts)), key=lambda expert: experts[expert].norm)
        for rank, expert in enumerate(ranked):
            view = experts[expert]
            seen = len(view.activations)
            rows.append(
                {
                    "layer": index,
                    "rank": rank,
                    "expert": expert,
                    "router_norm": view.norm,
                    "activation": statistics.mean(view.activations) if seen else None,
                    "activation_error": statistics.stdev(view.activations) / math.sqrt(seen) if seen > 1 else None,
                    "tokens": view.tokens,
                    "averaged": seen,
                    "lowest_gate": view.gates[-1] if seen else None,
                }
            )
        mine = [row for row in rows if row["layer"] == index]
        body.append([index, *_correlation(mine, "activation"), *_correlation(mine, "tokens"), _list(mine)])
    _draw_activations(bench, rows)
    header = ["layer", "ρ(norm, activation)", "p", "ρ(norm, tokens)", "p", "mean activation, smallest norm first"]
    lines = [
        f"Mean over the {TOP} tokens of the held-out text that give an expert the highest gating values (all, where "
        "fewer chose it) of mean |a|, a being the input of the down projection. ρ: Spearman's rank correlation with "
        f"the router norm over the experts of a layer, for activations those with at least {ENOUGH} tokens; the paper "
        "claims ρ > 0 for activations.",
        "",
        *markdown_table(header, body),
    ]
    return Result("Figure 10: activations by router norm", lines, rows, ["figure10.png"])


def _correlation(rows: Sequence[dict], name: str) -> tuple[str, str]:
    """Return Spearman's ρ with the router norm, and its p value."""
    known = [row for row in rows if name == "tokens" or row["tokens"] >= ENOUGH]
    if len(known) < 3 or len({row[name] for row in known}) == 1:
        return "–", "–"
    found = spearmanr([row["router_norm"] for row in known], [row[name] for row in known])
    return f"{found.statistic:+.2f}", f"{found.pvalue:.2g}"


def _list(rows: Sequence[dict]) -> str:
    return ", ".join(
        f"{row['activation']:.3f} (e{row['expert']}{'' if row['tokens'] >= ENOUGH else ', few tokens'})"
        if row["tokens"]
        else f"none (e{row['expert']})"
        for row in rows
    )


def _draw_activations(bench: Bench, rows: Sequence[dict]) -> None:
    layers = by_layer(rows)
    columns = min(4, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (index, experts) in zip(grid, layers.items(), strict=False):
        ranks = [row["rank"] for row in experts]
        values, errors = ([row[name] or 0.0 for row in experts] for name in ("activation", "activation_error"))
        axes.bar(ranks, values, yerr=errors, capsize=2, label="mean ± standard error over tokens")
        axes.set_xticks(ranks, [str(row["expert"]) for row in experts], fontsize=8 if len(ranks) <= 16 else 5)
        axes.set_title(f"layer {index}: ρ = {_correlation(experts, 'activation')[0]}", fontsize=10)
        axes.set_xlabel("expert, by rising router norm")
        axes.set_ylabel(f"mean |a|, top {TOP} tokens")
    for axes in list(grid)[len(layers) :]:
        axes.set_visible(False)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(bench.output / "figure10.png", dpi=130)


def figure11(bench: Bench) -> Result:
    """Which tokens choose the experts of smallest and of largest norm in the first MoE layer?"""
    tokenizer, ids = _tokens(bench)
    first = bench.layout.layers[0].index
    experts = views(bench, ids, first)[first]
    ranked = sorted(range(len(experts)), key=lambda expert: experts[expert].norm)
    counts = Counter(ids)
    wanted = {"smallest": ranked[0], "second largest": ranked[-2], "largest": ranked[-1]}
    rows: list[dict] = []
    lines = [
        f"Layer {first}. The tokens that give an expert the highest gating values on the held-out text, in ⟦⟧, with "
        f"{AROUND} neighbours on each side; repeated tokens once. · space, ⏎ newline, ⇥ tab, ¦ vertical bar, ˋ "
        "backtick.",
        "",
    ]
    for name, expert in wanted.items():
        view = experts[expert]
        lines += [f"### Expert {expert} ({name} router norm, {view.norm:.4g}; {view.tokens:,} tokens)", ""]
        body = []
        for position, gate in _distinct(view, ids):
            context = _context(tokenizer, ids, position)
            times = counts[ids[position]]
            body.append([f"{gate:.3f}", times, f"`{context}`"])
            rows.append({"norm": name, "expert": expert, "gate": gate, "times_in_text": times, "context": context})
        lines += [*markdown_table(["gating value", "times in the text", "token in context"], body), ""]
    return Result("Figure 11: tokens of the smallest and largest norms", lines + _rarity(experts, ranked, ids), rows)


def _distinct(view: View, ids: Sequence[int]) -> list[tuple[int, float]]:
    """Return the first positions and gating values, every token once: source text repeats itself."""
    found: dict[int, tuple[int, float]] = {}
    for position, gate in zip(view.positions, view.gates, strict=True):
        found.setdefault(ids[position], (position, gate))
    return list(found.values())[:SHOWN]


def _context(tokenizer: object, ids: Sequence[int], position: int) -> str:
    before, token, after = (
        tokenizer.decode(ids[max(0, begin) : end]).translate(VISIBLE)  # type: ignore[attr-defined]
        for begin, end in (
            (position - AROUND, position),
            (position, position + 1),
            (position + 1, position + 1 + AROUND),
        )
    )
    return f"{before}⟦{token}⟧{after}"


def _rarity(experts: Sequence[View], ranked: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return how common the tokens of every expert are: the paper's claim is that small norms are for rare ones."""
    counts = Counter(ids)
    rows = []
    for expert in ranked:
        view = experts[expert]
        times = [counts[ids[position]] for position in view.positions]
        median = statistics.median(times) if times else 0
        rows.append({"expert": expert, "router_norm": view.norm, "tokens": view.tokens, "times": median})
    (rho, p), (rho_tokens, p_tokens) = _correlation(rows, "times"), _correlation(rows, "tokens")
    body = [[row["expert"], f"{row['router_norm']:.4g}", row["tokens"], f"{row['times']:g}"] for row in rows]
    header = ["expert", "router norm", "tokens that chose it", f"median times in the text of its top {TOP} tokens"]
    return [
        "### How common the tokens are",
        "",
        *markdown_table(header, body),
        "",
        f"Spearman's ρ with the router norm: times in the text {rho} (p = {p}), tokens that chose it {rho_tokens} "
        f"(p = {p_tokens}); the former of experts with at least {ENOUGH} tokens. The paper reads larger norm as more "
        "frequent: ρ > 0.",
    ]
