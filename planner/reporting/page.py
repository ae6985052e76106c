"""Render report.html, a page that loads no other files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from planner.common.units import size
from planner.reporting.bar import part_class, size_bar
from planner.reporting.command_lines import (
    auto_class,
    evaluate_commands,
    method_in_words,
    quantize_line,
    serve_commands,
    unserved,
)
from planner.reporting.facts import Facts
from planner.reporting.heatmap import value_map, width_map
from planner.reporting.palette import DARK, LIGHT, css_classes, css_variables
from planner.reporting.scale import number
from planner.reporting.tables import evaluation_tables, layer_table, named, size_table
from planner.reporting.value_maps import ValueMaps

ROOM = 1096
"""Width of the content in pixels, for a window of 1280 pixels with margins."""

COLUMNS = ((16, "three", 338), (120, "two", 528), (1 << 30, "one", ROOM))
"""(maximum number of experts per layer, CSS class of the grid of small maps, width of a small map in pixels)."""

NUMBER = re.compile(r"^\d+ ")
"""Count of an expert's tokens at the begin of a fallback's reason. It is removed to group equal reasons."""

STEPS = (("ArrowLeft", "←", "previous expert"), ("ArrowRight", "→", "next expert"),
         ("ArrowUp", "↑", "previous layer"), ("ArrowDown", "↓", "next layer"))  # fmt: skip
"""(key that does the same, sign, name) of the buttons with which a finger goes from cell to cell."""

TIP = (
    '<div id="tip" hidden><div id="what"></div><div class="steps">'
    + "".join(
        f'<button type="button" data-key="{key}" aria-label="{name}">{sign}</button>' for key, sign, name in STEPS
    )
    + '</div></div><div id="said" class="unseen" role="status"></div>'
)
"""What is known of an expert, and the text that a screen reader says; the page's script fills both."""

HINT = (
    '<p class="note" id="hint" hidden>Point at a cell or tap it to see what is known of its expert. With the keyboard: '
    "Tab goes to a map, arrow keys from cell to cell, Escape hides the text.</p>"
)

LAYERS_OPEN = 16
"""Maximum number of layers for which the table of layers is unfolded."""


def render(facts: Facts, grids: ValueMaps) -> str:
    """Return the page's HTML. All text from the checkpoint is escaped."""
    css = _style()
    script = _asset("copy.js") + _asset("tooltip.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(css)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    body = "".join((_head(facts), _widths(facts), _maps(facts, grids), _layers(facts), _sizes(facts)))
    body += _evaluation(facts) + _commands(facts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title(facts))}</title><style>{css}</style></head>\n<body><main>{body}</main>"
        f"{TIP}"
        f'<script type="application/json" id="values">{_values(facts, grids)}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def title(facts: Facts) -> str:
    """Return the page's title."""
    return f"{named(facts.name or facts.folder_name)}, {facts.average_bits:.3g} bits per expert weight"


def _asset(name: str) -> str:
    return files("planner.reporting").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    light, dark = css_variables(LIGHT), css_variables(DARK)
    screen = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{{light}}}{screen}{css_classes()}{_asset('style.css')}"


def _digest(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows an inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _head(facts: Facts) -> str:
    plan = facts.config.plan
    quantizer = f", {plan.quantizer}" if plan.quantizer else ""
    lead = (
        f"{named(facts.model_type)} · {len(facts.layers)} MoE layers, {facts.num_experts:,} experts · "
        f"method {named(method_in_words(facts))}{named(quantizer)}"
    )
    boxes = [
        ("Bits per expert weight", f"{facts.average_bits:.4g}", f"{plan.avg_bits:g} requested"),
        ("Size", size(facts.sizes.total), f"of {size(facts.sizes.before)} in the source"
         if facts.sizes.source else f"of {size(facts.sizes.before)} in 16 bits"),
        ("Times smaller", f"{facts.sizes.ratio:.2f}×", "all tensors"),
    ]  # fmt: skip
    for text in facts.evaluations.texts[:1]:
        original = text.reference_perplexity
        more = f"original {number(original, 4)}" if original is not None else f"{text.tokens:,} tokens"
        boxes.append(("Perplexity", number(text.perplexity, 4), f"{more} · {named(text.data)}"))
        if text.kl is not None:
            error = f"± {number(text.kl.error, 2)} nats per token"
            boxes.append(("KL divergence to the original", number(text.kl.mean), error))
    drawn = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><span>{escape(more)}</span></dd></div>"
        for name, value, more in boxes
    )
    name = escape(named(facts.name or facts.folder_name))
    return f'<header><h1>{name}</h1><p class="lead">{escape(lead)}</p><dl class="headline">{drawn}</dl></header>'


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{heading}</h2>{''.join(parts)}</section>"


def _swatch(fill: str, mark: str = "") -> str:
    shape = f'<path class="{fill}-ink" d="{mark}"/>' if mark else ""
    return f'<svg width="14" height="14" aria-hidden="true"><path class="{fill}" d="M0 0h14v14H0z"/>{shape}</svg>'


def _widths(facts: Facts) -> str:
    total = facts.num_experts
    keys = [
        (_swatch(f"b{bits}"), f"{bits} bit{'s' if bits > 1 else ''}{_stored(facts, scheme)}", count)
        for (bits, scheme), count in facts.kinds.items()
    ]
    keys.append((_swatch("blank", "M0 0h8l-8 8z"), "promoted by MaxVar", facts.num_promoted))
    keys.append((_swatch("blank", "M14 14h-6v-6h6z"), "fallback, not quantized as asked for", facts.num_fallbacks))
    items = "".join(
        f"<li>{swatch}{text} <span>{count:,} ({count / total:.1%})</span></li>" for swatch, text, count in keys if count
    )
    figure = f'<figure class="widths">{width_map(facts, ROOM)}</figure>'
    return _section("Widths", f'<ul class="key">{items}</ul>{figure}', HINT, _reasons(facts))


def _stored(facts: Facts, scheme: str) -> str:
    """Return a scheme behind a width; nothing where all are grids."""
    return "" if facts.grids_alone else f", {scheme}"


def _reasons(facts: Facts) -> str:
    """Return a note on the reasons for fallbacks."""
    reasons = [NUMBER.sub("", why) for layer in facts.layers for why in layer.fallbacks.values()]
    lines = "; ".join(f"{named(why)}: {count:,}" for why, count in Counter(reasons).most_common(5))
    return f'<p class="note">Fallbacks by reason: {escape(lines)}.</p>' if lines else ""


def _maps(facts: Facts, grids: ValueMaps) -> str:
    _, name, room = next(row for row in COLUMNS if facts.most_experts <= row[0])
    figures = "".join(
        f'<figure><h3>{escape(grid.title)}</h3><p class="meaning">{escape(grid.meaning)}</p>'
        f"{value_map(facts, grid, room)}</figure>"
        for grid in grids.known
    )
    missing = "".join(f'<p class="note">{escape(line)}.</p>' for line in grids.missing)
    return _section("Expert by expert", f'<div class="maps {name}">{figures}</div>', _gap(missing))


def _gap(html: str) -> str:
    return f"<div><br>{html}</div>" if html else ""


def _layers(facts: Facts) -> str:
    table = layer_table(facts).html()
    if len(facts.layers) > LAYERS_OPEN:
        table = f"<details><summary>{len(facts.layers)} layers</summary>{table}</details>"
    return _section("Layer by layer", table)


def _sizes(facts: Facts) -> str:
    parts = facts.sizes.parts

    def lead(row: int) -> str:
        return _swatch(part_class(parts, row)) if row < len(parts) else ""

    return _section("Size", f"<br>{size_bar(facts)}", size_table(facts).html(lead))


def _evaluation(facts: Facts) -> str:
    tables = [table.html() for table in evaluation_tables(facts.evaluations)]
    none = '<p class="note">Nothing has been measured yet; the command below does.</p>'
    note = '<p class="note">±: standard error.</p>' if tables else none
    return _section("Evaluation", note, *tables)


def _commands(facts: Facts) -> str:
    folder = facts.folder_name
    serving = serve_commands(facts, folder)
    why = "" if serving else f'<p class="note">vLLM cannot serve it: {escape(unserved(facts) or "")}.</p>'
    load = f"import vllm_moeq.hf\nmodel = {auto_class(facts)}.from_pretrained({json.dumps(folder)})"
    parts: Iterable[tuple[str, Sequence[str]]] = (
        ("Made with", [quantize_line(facts, folder)]),
        ("Serve", serving),
        ("Load in transformers", [load]),
        ("Evaluate", evaluate_commands(facts, folder)),
        ("Check every tensor", [shlex.join(["moeq", "verify", folder])]),
    )
    blocks = "".join(f"<h3>{name}</h3>{''.join(map(_command, texts))}" for name, texts in parts if texts)
    return _section("Commands", "<br>", blocks, why)


def _command(text: str) -> str:
    """Return a command, beside which the page's script puts a button that copies it. Lines break between words only."""
    lines = (" ".join(f"<span>{escape(word)}</span>" for word in line.split(" ")) for line in text.split("\n"))
    return '<div class="command"><pre>' + "\n".join(lines) + "</pre></div>"


def _values(facts: Facts, grids: ValueMaps) -> str:
    """Return the data for tooltips as JSON. ``<``, ``>`` and ``&`` are escaped so that it cannot end its element."""
    notes: dict[str, list[str]] = {}
    for index, layer in enumerate(facts.layers):
        for expert in sorted(layer.promoted):
            notes.setdefault(f"{index} {expert}", []).append("promoted by MaxVar")
        for expert, why in sorted(layer.fallbacks.items()):
            notes.setdefault(f"{index} {expert}", []).append(f"fallback: {named(why)}")
    known = [[grid.title, grid.unit, [list(map(_rounded, row)) for row in grid.values]] for grid in grids.known]
    value: dict[str, object] = {
        "layers": [layer.label for layer in facts.layers],
        "widths": [layer.widths for layer in facts.layers],
        "grids": known,
        "notes": notes,
    }
    if not facts.grids_alone:
        value["schemes"] = [layer.schemes for layer in facts.layers]
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
