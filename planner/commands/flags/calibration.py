"""The flags of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from planner.calibration.reading.text import SEQUENCE, CalibrationText, calibration_text, longest_text, shortage
from planner.common.progress import Progress
from planner.model.source import SourceModel
from planner.text.sources import DATASETS
from vllm_moeq.format import UsageError


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
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = 128
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", min=16, help=f"Tokens of each sequence [{SEQUENCE}, or what the model can read]."),
    ] = None

    def read(self, model: SourceModel, seed: int) -> CalibrationText:
        """Return the text.

        Raises:
            MoeqError: no data, sequences longer than the model can read, too little text.
        """
        if self.data is None:
            raise UsageError("--data: calibration needs a text, found none; for example --data wikitext2")
        longest = longest_text(model)
        if self.seq_len is not None and self.seq_len > longest:
            raise UsageError(f"--seq-len: expected at most {longest}, the model's longest text, found {self.seq_len}")
        found = calibration_text(model.folder, self.data, self.samples, self.seq_len or min(SEQUENCE, longest), seed)
        note = shortage(found, self.samples)
        if note is not None:
            Progress().line(note)
        return found
