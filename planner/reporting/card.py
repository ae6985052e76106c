"""Write a checkpoint's model card, README.md: contents, origin, use, and evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from planner.common.install import CPU_INSTALL, WHERE, install_command
from planner.common.units import size
from planner.evaluation.record import Evaluations, read_evaluations
from planner.output.files import atomic
from planner.quantization.quantizers.table import QUANTIZERS
from planner.reporting.command_lines import auto_class, method_in_words, quantize_line, serve_commands, unserved
from planner.reporting.facts import Facts, collect
from planner.reporting.files import CARD
from planner.reporting.tables import evaluation_tables, markdown, named, size_table, width_table
from vllm_moeq.format import GRID, SCHEMES
from vllm_moeq.format.files import check_inside, read_bytes

DIR = "DIR"
"""Placeholder for the folder, since the folder's name must not change the card."""

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
MAX_BYTES = 1 << 22
"""Bytes of a card whose evaluation section is replaced."""
ON_THE_HUB = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
"""Names that the Hub accepts as a model's name. It refuses cards with other names."""

LISTED = 8
"""Number of fallbacks that the card lists. The report lists all."""


def write_card(folder: Path) -> None:
    """Write a checkpoint's model card. It depends on the checkpoint only, not on the folder's name.

    Raises:
        MoeqError: no checkpoint, damaged JSON, a full disk.
    """
    _write(folder / CARD, card(collect(folder)))


def refresh_card(folder: Path) -> bool:
    """Update the evaluation section of a card; write the card if there is none.

    Returns:
        Whether the card now shows the evaluations. A card without our section, written by someone else, is not changed.

    Raises:
        MoeqError: as :func:`write_card`.
    """
    path = folder / CARD
    check_inside(path)
    if not path.exists():
        write_card(folder)
        return True
    before = read_bytes(path, MAX_BYTES).decode("utf-8", errors="surrogateescape")
    begin = before.find(BEGIN)
    end = before.find(END, begin) if begin >= 0 else -1
    if end < 0:
        return False
    after = before[:begin] + evaluation_section(read_evaluations(folder)) + before[end + len(END) :]
    if after != before:
        _write(path, after)
    return True


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="surrogateescape"))


def card(facts: Facts) -> str:
    """Return the text of the card."""
    parts = [_front_matter(facts), _introduction(facts), _use(facts), _plan(facts), _sizes(facts)]
    parts += [_calibration(facts), f"## Evaluation\n\n{evaluation_section(facts.evaluations)}", _license(facts)]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts) -> str:
    """Return the YAML front matter for the Hub. Strings are written as JSON, which is valid YAML."""
    source = facts.recorded.source
    known = source is not None and ON_THE_HUB.fullmatch(source.name) is not None
    encoder_decoder = bool(facts.model.get("is_encoder_decoder"))
    fields: dict[str, Any] = {
        "base_model": source.name if source and known else None,
        "base_model_relation": "quantized" if known else None,
        "library_name": "transformers" if unserved(facts) else "vllm",
        "pipeline_tag": "text2text-generation" if encoder_decoder else "text-generation",
        "license": source.license if source else None,
        "license_name": source.license_name if source else None,
        "license_link": source.license_link if source else None,
        "tags": ["moeq", "vllm-moeq", "mixture-of-experts", "mixed-precision"],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _introduction(facts: Facts) -> str:
    name = markdown(named(facts.name)) if facts.name else "A Mixture-of-Experts model"
    source = facts.recorded.source
    commit = f", commit {markdown(named(source.revision))}," if source and source.revision else ""
    return (
        f"# {name}, {facts.average_bits:.3g} bits per expert weight\n\n"
        f"{name}{commit} quantized by vllm-moeq, every expert with its own width: {size(facts.sizes.total)} instead of "
        f"{size(facts.sizes.before)}, {facts.sizes.ratio:.2f} times smaller."
    )


def _use(facts: Facts) -> str:
    serving = serve_commands(facts, DIR)
    kind = auto_class(facts)
    extra, otherwise = ("gpu", f"; for CPUs: `{CPU_INSTALL}` there") if serving else ("hf", "")
    lines = ["## Use", "", f"`{DIR}` is this folder. To install: `{install_command(extra)}` {WHERE}{otherwise}."]
    if serving:
        lines += ["", _block(serving[0])]
        lines += ["", "or, with the CUDA package of vLLM:", "", _block(serving[1])]
    else:
        lines += ["", f"vLLM cannot serve it: {unserved(facts)}. transformers loads it:"]
    code = f"import vllm_moeq.hf  # {install_command('hf')}\nfrom transformers import {kind}\n\n"
    lines += ["", _block(f'{code}model = {kind}.from_pretrained("{DIR}")', "python")]
    return "\n".join(lines)


def _block(text: str, language: str = "sh") -> str:
    """Return a fenced block. Fences inside the text are removed, since names in it come from other files."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("```"))
    return f"```{language}\n{lines}\n```"


def _plan(facts: Facts) -> str:
    plan = facts.config.plan
    promoted = f"; MaxVar promoted {facts.num_promoted:,} experts" if facts.num_promoted else ""
    return (
        f"## Plan\n\nMethod {markdown(named(method_in_words(facts)))}: {plan.avg_bits:g} bits on average requested, "
        f"{facts.average_bits:.4f} achieved{promoted}. Codes: {_codes(facts)}; other linears have "
        f"{' or '.join(map(str, facts.config.linear.choices))} bits.\n\n"
        f"{width_table(facts).markdown()}\n\n"
        "The widths of all experts are in `config.json`, the reasons in `plan.json`. Made with\n\n"
        f"{_block(quantize_line(facts, DIR))}"
    )


def _codes(facts: Facts) -> str:
    """Return what found the experts' codes, by scheme."""
    config = facts.config
    by = config.plan.quantizer
    quantizer = markdown(named(by)) if by else "quantizer not recorded"
    groups = "one scale per row" if config.group_size < 0 else f"groups of {config.group_size}"
    used = {config.scheme(prefix, it) for prefix, widths in config.experts.items() for it in range(len(widths))}
    others = QUANTIZERS[by].others if by in QUANTIZERS else {}
    parts = [f"{quantizer}, {groups}"] if GRID in used else []
    parts += [f"{it.name} by {others.get(it.name, quantizer)}" for it in SCHEMES.values() if it in used - {GRID}]
    return "; ".join([*parts, *(["experts in a rotated basis"] if config.rotation is not None else [])])


def _sizes(facts: Facts) -> str:
    return f"## Size\n\n{size_table(facts).markdown()}"


def _calibration(facts: Facts) -> str:
    calibration = facts.recorded.calibration
    if calibration is None:
        none = "Not recorded by what quantized it." if facts.imported else "None: no text was read."
        return f"## Calibration\n\n{none}"
    lines = [
        "## Calibration",
        "",
        f"{calibration.sequences:,} × {calibration.seq_len:,} tokens of {markdown(named(calibration.data))}, "
        f"seed {calibration.seed}.",
    ]
    found = [(layer.label, expert, why) for layer in facts.layers for expert, why in sorted(layer.fallbacks.items())]
    if not found:
        gptq = facts.recorded.settings.gptq is not None
        lines[-1] += " Every expert was quantized with it." if gptq else " It decided the widths."
        return "\n".join(lines)
    lines[-1] += f" {len(found):,} of {facts.num_experts:,} experts were quantized without it:"
    lines.append("")
    for label, expert, why in found[:LISTED]:
        lines.append(f"- layer {markdown(label)}, expert {expert}: {markdown(named(why))}")
    if len(found) > LISTED:
        lines.append(f"- {len(found) - LISTED:,} more are in `quantization_report.json`")
    return "\n".join(lines)


def evaluation_section(found: Evaluations) -> str:
    """Return the evaluation section that :func:`refresh_card` replaces, with its begin and end marks."""
    tables = [table.markdown() for table in evaluation_tables(found)]
    if not tables:
        return f"{BEGIN}\nNot measured yet: `moeq eval {DIR} --data text.txt`.\n{END}"
    return "\n\n".join([BEGIN, *tables, "±: standard error.", END])


def _license(facts: Facts) -> str:
    source = facts.recorded.source
    if source is None or source.license is None:
        return "## License\n\nThe source model’s; its folder names none."
    name = source.license_name if source.license == "other" and source.license_name else source.license
    return f"## License\n\nThe source model’s: {markdown(named(name))}."
