"""The commands that turn checkpoints into other formats, and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from planner.commands import show
from planner.commands.flags.common import DryRun, Folder, Json, NewFolder
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.estimates.exchange import export_needs, import_needs
from planner.exchange.dense import export_dense
from planner.model.hub import resolve_model
from planner.output.unfinished import check_output
from planner.report.card import write_card
from vllm_moeq.format import UsageError


class Format(StrEnum):
    """Formats to export to."""

    bf16 = "bf16"
    f32 = "f32"
    gptq = "gptq"


DENSE = {Format.bf16: torch.bfloat16, Format.f32: torch.float32}


class StoredZeros(StrEnum):
    """How AutoGPTQ's format stores zero points."""

    v1 = "v1"
    v2 = "v2"


def export_command(
    folder: Folder,
    output: NewFolder,
    format_: Annotated[
        Format, typer.Option("--format", help="bf16, f32: dense, for any server; gptq: packed, for GPTQModel.")
    ] = Format.bf16,
    zero_points: Annotated[
        StoredZeros | None,
        typer.Option("--zero-points", help="For gptq: stored as they are (v2, the default) or less one (v1)."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the checkpoint in another format, with exactly the quantized values.

    Example: moeq export Mixtral-8x7B-2.5bit -o Mixtral-8x7B-2.5bit-dense
    """
    check_output(output)
    if format_ in DENSE and zero_points is not None:
        raise UsageError(f"--zero-points: expected --format gptq with it, found --format {format_.value}")
    if dry_run:
        report_needs("exporting", export_needs(folder, DENSE[format_].itemsize if format_ in DENSE else None), as_json)
        return
    if format_ in DENSE:
        export_dense(folder, output, Progress(), DENSE[format_])
    else:
        from planner.exchange.autogptq import export_gptq

        export_gptq(folder, output, (zero_points or StoredZeros.v2).value, Progress())
    _done(output, as_json)


def import_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="GPTQ checkpoint: folder or Hub name (owner/name).")],
    output: NewFolder,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Turn a GPTQ checkpoint, with one width per expert or one for all, into one to serve, without requantizing.

    Example: moeq import Mixtral-8x7B-gptq -o Mixtral-8x7B-imported
    """
    from planner.exchange.autogptq import import_gptq

    check_output(output)
    if dry_run:
        report_needs("importing", import_needs(resolve_model(model)), as_json)
        return
    import_gptq(resolve_model(model), output, Progress(), write_card)
    _done(output, as_json)


def _done(output: Path, as_json: bool) -> None:
    if as_json:
        show.emit({"output": str(output)})
    else:
        print(f"wrote {output}")
