"""The flags of calibration and of GPTQ, and what they come to."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from planner.calibration.reading.text import DATASETS, SEQUENCE, CalibrationText, calibration_text, longest_text
from planner.commands.completion import some_of
from planner.model.source import SourceModel
from planner.planning.methods import METHODS
from planner.quantization.quantizers.gptq import PUBLISHED, GptqSettings
from planner.quantization.runners.choose import read_devices
from vllm_moeq.format import UsageError


class ActOrder(StrEnum):
    """Order in which GPTQ quantizes columns."""

    none = "none"
    group = "group"
    full = "full"


class Search(StrEnum):
    """How GPTQ chooses scales."""

    mse = "mse"
    range = "range"


Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        help=f"Calibration text: a text or JSON-lines file, {', '.join(DATASETS)}, or owner/name[:config]@commit.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", min=16, help=f"Tokens of each [{SEQUENCE}, or what the model can read].")
]
For = Annotated[
    str,
    typer.Option(
        "--for",
        metavar="LIST",
        autocompletion=some_of(name for name, method in METHODS.items() if method.calibrated),
        help="Methods that will use the statistics, such as kl or pmq,gemq.",
    ),
]
MinTokens = Annotated[
    int, typer.Option("--min-tokens", min=1, help="Experts that saw fewer are quantized with hqq, without calibration.")
]
Damping = Annotated[float, typer.Option("--damping", help="GPTQ: added to the Hessian, relative to its mean diagonal.")]
ActOrderFlag = Annotated[
    ActOrder, typer.Option("--act-order", help="GPTQ: columns by importance, within groups or (static groups) all.")
]
StaticGroups = Annotated[bool, typer.Option("--static-groups", help="GPTQ: scales from the original weights.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="GPTQ: zero points in the middle of the codes.")]
SearchFlag = Annotated[Search, typer.Option("--scale-search", help="GPTQ: least weighted error, or the range.")]
Compat = Annotated[bool, typer.Option("--compat", help="GPTQ: the variant of the paper's published code.")]


def gptq_settings(
    *, damping: float, act_order: str, static_groups: bool, symmetric: bool, search: str, compat: bool
) -> GptqSettings:
    """Turn flags into settings.

    Raises:
        UsageError: flags that exclude each other, or a damping that is no fraction.
    """
    if not 0 <= damping <= 1:
        raise UsageError(f"--damping: expected a number between 0 and 1, found {damping:g}")
    if act_order == "full" and not static_groups:
        raise UsageError("--act-order full: expected --static-groups too, or groups would have no fixed columns")
    made = GptqSettings(damping, act_order, static_groups, symmetric, search)  # type: ignore[arg-type]
    if not compat:
        return made
    if made != GptqSettings():
        raise UsageError("--compat: expected no other GPTQ flags, it stands for all of them")
    return PUBLISHED


def read_calibration(
    model: SourceModel, data: str | None, samples: int, seq_len: int | None, seed: int
) -> CalibrationText:
    """Return the calibration text that flags ask for.

    Raises:
        MoeqError: no data, sequences longer than the model can read, too little text.
    """
    if data is None:
        raise UsageError("--data: calibration needs a text, found none; for example --data wikitext2")
    longest = longest_text(model)
    if seq_len is not None and seq_len > longest:
        raise UsageError(f"--seq-len: expected at most {longest}, the model's longest text, found {seq_len}")
    return calibration_text(model.folder, data, samples, seq_len or min(SEQUENCE, longest), seed)


def expert_devices(name: str, jobs: int | None, ray: bool) -> tuple[torch.device, ...]:
    """Return where the experts of a layer are quantized, one entry for each batch at a time.

    Raises:
        UsageError: devices that are not there, fewer jobs than devices, a cluster.
    """
    names = read_devices(name)
    if ray:
        raise UsageError(
            "--ray: expected a quantizer without calibration; with gptq each layer reads what the quantized layers "
            "before it produce (--jobs and several devices share the experts of a layer)"
        )
    count = jobs or len(names)
    if count < len(names):
        raise UsageError(f"--jobs: expected at least one per device ({len(names)}), found {count}")
    return tuple(torch.device(names[index % len(names)]) for index in range(count))


StatsFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Statistics to write, .safetensors.")]
