"""The arguments of ``planner.quantize``, and the plan among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from planner.api.keywords.codes import GptqKeywords, SchemeKeyword, StorageKeywords, WrittenCodeKeywords
from planner.api.keywords.common import PathName
from planner.api.keywords.running import MtpKeyword, QuantizeRunKeywords
from planner.api.keywords.text import TextKeywords
from planner.api.presets import PresetKeywords
from planner.api.results import Planned
from planner.model.layout import Layout
from planner.model.source import SourceModel
from planner.plan_file import Plan, read_plan
from planner.quantization.quantizers.table import AUTO_SCHEME, SchemeChoice, check_widths, possible_schemes, scheme_for
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import Scheme, UsageError


@dataclass(frozen=True)
class QuantizeKeywords(
    PresetKeywords,
    QuantizeRunKeywords,
    GptqKeywords,
    TextKeywords,
    SchemeKeyword,
    StorageKeywords,
    WrittenCodeKeywords,
    MtpKeyword,
):
    """The arguments of :func:`planner.quantize`.

    Attributes:
        model: folder or Hub name (owner/name).
        output: folder to create.
        plan: take what :func:`planner.plan` made, or the plan.json at this path, instead of making a plan.
    """

    model: PathName
    _: KW_ONLY
    output: PathName
    plan: Planned | Plan | PathName | None = None


def given_plan(
    wanted: QuantizeKeywords,
    given: Planned | Plan | PathName,
    source: SourceModel,
    layout: Layout,
    settings: QuantizeSettings,
) -> Plan:
    """Return the plan that is given; say so where it was made for something else.

    Raises:
        MoeqError: no such file, no plan, the plan of another model, or widths that the quantizer does not offer.
    """
    given = given.plan if isinstance(given, Planned) else given
    made, where = (given, "--plan") if isinstance(given, Plan) else (read_plan(Path(given)), str(given))
    progress, fingerprint = wanted.display(), source.fingerprint()
    made.check_against(layout, where)
    _check_linear_bits(wanted, made, where)
    _check_scheme(wanted, made, where)
    for widths in made.experts.values():
        check_widths(settings.quantizer, widths)
    if made.source.get("fingerprint", fingerprint) != fingerprint:
        progress.line(f"note: {where} was made from other weights than {wanted.model}")
    if made.settings.quantizer not in (None, settings.quantizer):
        progress.line(f"note: {where} was made for --quantizer {made.settings.quantizer}")
    return made


def _check_linear_bits(wanted: QuantizeKeywords, made: Plan, where: str) -> None:
    """Raise UsageError where a plan and the argument both say, or leave open, which widths linears have."""
    planned = {str(bits) for bits in made.linears.values()}
    if planned and not wanted.linears_compete and wanted.linear_bits is not None and planned != {wanted.linear_bits}:
        raise UsageError(
            f"--linear-bits: expected auto or none, as {where} gives linears their widths, found {wanted.linear_bits}"
        )
    if wanted.linears_compete and not made.linears:
        raise UsageError(
            f"--linear-bits auto: expected a plan with widths of linears, which moeq plan --linear-bits auto makes; "
            f"found none in {where}"
        )


def _says_the_same(made: Plan, scheme: SchemeChoice) -> bool:
    """Tell whether a plan with schemes has those that the argument gives to its widths, or was left to choose."""
    return scheme == AUTO_SCHEME or all(
        [scheme_for(bits, scheme).name for bits in widths] == list(made.schemes[prefix])
        for prefix, widths in made.experts.items()
    )


def _check_scheme(wanted: QuantizeKeywords, made: Plan, where: str) -> None:
    """Raise UsageError where a plan and the argument both say, or leave open, how experts are stored."""
    if made.schemes:
        if wanted.scheme is not None and not _says_the_same(made, wanted.scheme):
            raise UsageError(f"--scheme: expected none, as {where} gives experts their schemes, found {wanted.scheme}")
    elif wanted.scheme == AUTO_SCHEME:
        raise UsageError(
            f"--scheme {AUTO_SCHEME}: expected a plan with schemes, which moeq plan --scheme {AUTO_SCHEME} may make; "
            f"found none in {where}"
        )


def sized(
    wanted: QuantizeKeywords, settings: QuantizeSettings, plan: Plan | None, text: bool
) -> tuple[QuantizeSettings, Sequence[Scheme]]:
    """Return the settings and the schemes with which sizes are to be checked."""
    if plan is None:
        return settings, possible_schemes(wanted.resolved_scheme, wanted.choices(text))
    settings = settings.with_plan(plan)
    return settings, settings.storage.all_schemes(plan.experts)
