"""Reconstruct the commands that made a checkpoint and the commands that use it, from its files."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from planner.evaluation.record import TaskResult, TextResult
from planner.model.recognize import find_architecture
from planner.planning.methods import METHODS, OURS, PAPER
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings
from planner.quantization.quantizers.linear import LINEAR_DEFAULT, LINEAR_DEFAULT_WITH_TEXT
from planner.quantization.quantizers.table import AUTO_SCHEME
from planner.quantization.record import printable, without_folder
from planner.quantization.settings import QuantizeSettings
from planner.reporting.facts import Facts
from vllm_moeq.format import GRID, TRELLIS_SCHEME

UNNAMED = "SOURCE"
"""Placeholder for a source that is not recorded."""


def quantize_line(facts: Facts, output: str) -> str:
    """Return the command that makes the checkpoint again. It uses plan.json if flags alone cannot give the widths."""
    if facts.imported:
        return shlex.join(["moeq", "import", facts.name or UNNAMED, "-o", output])
    flags = _plan_flags(facts)
    if flags is None:
        flags = ["--plan", f"{output}/plan.json"]
    if facts.config.rotation is not None and (flags[0] != "--plan" or not (facts.plan and facts.plan.schemes)):
        flags += ["--scheme", _scheme(facts)]
    words = ["moeq", "quantize", facts.name or UNNAMED, *flags, *_quantizer_flags(facts), "-o", output]
    return shlex.join(words)


def _plan_flags(facts: Facts) -> list[str] | None:
    plan = facts.plan
    if plan is None or plan.method not in METHODS:
        return None
    method, settings = METHODS[plan.method], plan.settings
    if settings.overrides or settings.stats or settings.initial_model:
        return None  # other files went into the plan
    if method.calibrated and facts.recorded.calibration is None:
        return None
    seed = settings.seed or (facts.recorded.calibration.seed if facts.recorded.calibration else 0)
    given = (
        ("--method", plan.method, None),
        ("--budget-gib", settings.budget_gib, None),
        ("--avg-bits", None if settings.budget_gib else f"{plan.avg_bits:.12g}", None),
        ("--bits", ",".join(map(str, plan.bit_choices)), None),
        ("--zeta", settings.zeta and f"{settings.zeta:.12g}", "3"),
        ("--promotion", settings.promotion, "official"),
        ("--counts", settings.counts, "paper"),
        ("--ranking", settings.ranking, method.scope),
        ("--seed", seed, 0),
    )
    return _flags(given)


def _quantizer_flags(facts: Facts) -> list[str]:
    recorded, config, default = facts.recorded, facts.config, QuantizeSettings()
    calibration, chosen = recorded.calibration, facts.plan is not None and facts.plan.linears
    given: list[tuple[str, object, object]] = [
        ("--quantizer", recorded.quantizer or config.plan.quantizer, None),
        ("--one-bit", recorded.one_bit, default.one_bit),
        ("--zero-points", recorded.settings.zero_points, default.zero_points),
        *([("--group-size", config.group_size, default.group_size)] if _may_have_grids(facts) else []),
        ("--linear-bits", "auto" if chosen or config.linear.widths else config.linear.bits, default.linear.bits),
        ("--linear-group-size", config.linear.group_size, None),
    ]
    if calibration is not None:
        given += [("--data", _file(calibration.data), None), ("--samples", calibration.sequences, None)]
        given += [("--seq-len", calibration.seq_len, None)]
        given += [("--min-tokens", recorded.settings.min_tokens, default.min_tokens)]
    if recorded.settings.gptq is not None and config.linear.bits != 16:  # what checkpoints without these records had
        given += [
            ("--linear-quantizer", recorded.settings.linear_quantizer or LINEAR_DEFAULT, LINEAR_DEFAULT_WITH_TEXT)
        ]
    return _flags(given) + _gptq_flags(facts)


def _scheme(facts: Facts) -> str:
    """Return the scheme that was asked for: ``auto`` alone leaves a grid where a trellis could be."""
    mixed = any(scheme == GRID.name and bits in TRELLIS_SCHEME.widths for bits, scheme in facts.kinds)
    return AUTO_SCHEME if mixed else TRELLIS_SCHEME.name


def _may_have_grids(facts: Facts) -> bool:
    """Tell whether an expert could be a grid; without any, flags of grids are refused."""
    config = facts.config
    if config.rotation is None or _scheme(facts) == AUTO_SCHEME:
        return True
    if facts.plan and facts.plan.schemes and _plan_flags(facts) is None:  # --plan says which are
        return any(scheme == GRID.name for _, scheme in facts.kinds)
    return not set(config.plan.bit_choices) <= set(TRELLIS_SCHEME.widths)


def _gptq_flags(facts: Facts) -> list[str]:
    found, default = facts.recorded.settings.gptq, GptqSettings()
    if found is None:
        return []
    aim = facts.recorded.settings.calibration or "symmetric"  # as before there was a choice
    if found.model_dump() == vars(PUBLISHED):
        return ["--compat", *_flags([("--calibration", aim, "symmetric")])]
    flags = _flags(
        (
            ("--calibration", aim, QuantizeSettings.calibration),
            ("--damping", f"{found.damping:g}", f"{default.damping:g}"),
            ("--act-order", found.act_order, default.act_order),
            ("--scale-search", found.search, default.search),
        )
    )
    if found.static_groups:
        flags += ["--static-groups"]
    elif _may_have_grids(facts):  # trellises alone are not swept
        flags += _flags([("--sweeps", found.sweeps, default.sweeps)])
    return flags + (["--symmetric"] if found.symmetric else [])


def _flags(given: Iterable[tuple[str, object, object]]) -> list[str]:
    """Return the command-line words for (flag, value, default); leave out values that are None or the default."""
    return [word for flag, value, default in given if value not in (None, default) for word in (flag, str(value))]


def _file(name: str) -> str:
    return printable(without_folder(name))


def serve_commands(facts: Facts, folder: str) -> list[str]:
    """Return the commands that serve the checkpoint; none if vLLM cannot serve it."""
    if unserved(facts) is not None:
        return []
    return [shlex.join(["moeq", "serve", folder]), shlex.join(["vllm", "serve", folder])]


def unserved(facts: Facts) -> str | None:
    """Return the reason why vLLM cannot serve the model; None if it can."""
    row = find_architecture(facts.model)
    return row.unserved if row else None


def auto_class(facts: Facts) -> str:
    """Return the name of transformers' class that loads the model."""
    return "AutoModelForSeq2SeqLM" if facts.model.get("is_encoder_decoder") else "AutoModelForCausalLM"


def evaluate_commands(facts: Facts, folder: str) -> list[str]:
    """Return the commands that measured the checkpoint; if there are none, one that would."""
    found = facts.evaluations
    measured = [*map(_evaluation_flags, found.texts), *_task_flags(found.tasks)]
    if not measured:
        measured = [["--data", "text.txt", *(["--reference", facts.name] if facts.name else [])]]
    return [shlex.join(["moeq", "eval", folder, *flags]) for flags in measured]


def _task_flags(results: Iterable[TaskResult]) -> list[list[str]]:
    """Return a list of flags for each limit and backend, one command each."""
    tasks: dict[tuple[int | None, str], dict[str, None]] = {}
    for it in results:
        tasks.setdefault((it.limit, it.backend), {})[_file(it.task)] = None
    return [
        _flags((("--tasks", ",".join(names), None), ("--limit", limit, None), ("--backend", backend, "transformers")))
        for (limit, backend), names in tasks.items()
    ]


def _evaluation_flags(text: TextResult) -> list[str]:
    reference = None if text.reference is None else _file(text.reference)
    window = ("--window", text.window, None)  # by default as much as the model can read
    return _flags((("--data", _file(text.data), None), window, ("--reference", reference, None)))


def method_in_words(facts: Facts) -> str:
    """Return the method's name, with a short explanation for known methods."""
    method = facts.config.plan.method
    words = {PAPER: "the paper’s rule", OURS: "one budget spent by KL divergence"}
    return f"{method} ({words[method]})" if method in words else method
