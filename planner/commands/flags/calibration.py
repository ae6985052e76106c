"""The flags of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from planner.api.keywords.text import TextKeywords
from planner.calibration.reading.text import SEQUENCE
from planner.text.sources import DATASETS


@dataclass(frozen=True)
class TextFlags:
    """The text that a model reads for its calibration."""

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help=f"Calibration text: a file of text, JSON, CSV or parquet, {', '.join(DATASETS)}, or a dataset of the "
            "Hub, owner/name@commit or owner/name:config@commit.",
        ),
    ] = None
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = TextKeywords.samples
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=16, help=f"Tokens of each sequence [{SEQUENCE}, or what the model can read]."),
    ] = TextKeywords.seq_len
