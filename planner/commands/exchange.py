"""The commands that turn checkpoints into other formats, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from planner.api.results import Estimate
from planner.commands import show
from planner.commands.flags.common import DryRun, Folder, Json, NewFolder
from planner.commands.flatten import OneOf
from planner.commands.show_needs import report_needs
from planner.common.progress import Progress
from planner.common.shown import say
from planner.estimates.exchange import export_needs, import_needs
from planner.exchange.autogptq import export_gptq, import_gptq
from planner.exchange.autogptq.layout import Version
from planner.exchange.dense import export_dense
from planner.model.hub import resolve_model
from planner.output.paths import check_output
from planner.reporting.card import write_card
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class Format:
    """A format to export to.

    Attributes:
        write: makes the output; it takes the checkpoint, the folder to create, ``--zero-points`` and a progress.
        use: what it is for, as ``--help`` says it.
        item_bytes: bytes of a dense weight; None where weights stay packed.
        zero_points: whether the format stores zero points.
    """

    write: Callable[[Path, Path, Version | None, Progress], None]
    use: str
    item_bytes: int | None = None
    zero_points: bool = False


def _dense(dtype: torch.dtype) -> Format:
    """Return the format of an ordinary model, with weights of this type."""
    return Format(
        lambda folder, output, _, progress: export_dense(folder, output, progress, dtype),
        "dense, for any server",
        dtype.itemsize,
    )


def _write_gptq(folder: Path, output: Path, version: Version | None, progress: Progress) -> None:
    export_gptq(folder, output, version or "v2", progress)


FORMATS = {
    "bf16": _dense(torch.bfloat16),
    "f32": _dense(torch.float32),
    "gptq": Format(_write_gptq, "packed, for GPTQModel", zero_points=True),
}
"""The formats by name; a new one is a row here."""


def _uses() -> str:
    """Return the help of ``--format``: formats with the same use stand together."""
    names: dict[str, list[str]] = {}
    for name, row in FORMATS.items():
        names.setdefault(row.use, []).append(name)
    return "; ".join(": ".join((", ".join(same), use)) for use, same in names.items()) + "."


def export_command(
    folder: Folder,
    output: NewFolder,
    format_: Annotated[
        str,
        typer.Option("--format", help=f"Format to write: {_uses()}"),
        OneOf(FORMATS),
    ] = "bf16",
    zero_points: Annotated[
        Version | None,
        typer.Option("--zero-points", help="Zero points of gptq: as they are (v2, the default) or less one (v1)."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the checkpoint in another format, with exactly the quantized values.

    Example: moeq export Mixtral-8x7B-2.5bit -o Mixtral-8x7B-2.5bit-dense
    """
    check_output(output)
    chosen = FORMATS[format_]
    if zero_points is not None and not chosen.zero_points:
        names = " or ".join(name for name, row in FORMATS.items() if row.zero_points)
        raise UsageError(f"--zero-points: expected --format {names} with it, found --format {format_}")
    if dry_run:
        report_needs("exporting", Estimate(export_needs(folder, chosen.item_bytes)), as_json)
        return
    chosen.write(folder, output, zero_points, Progress())
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
    check_output(output)
    if dry_run:
        report_needs("importing", Estimate(import_needs(resolve_model(model))), as_json)
        return
    import_gptq(resolve_model(model), output, Progress(), write_card)
    _done(output, as_json)


def _done(output: Path, as_json: bool) -> None:
    if as_json:
        show.emit({"output": str(output)})
    else:
        say(f"wrote {output}")
