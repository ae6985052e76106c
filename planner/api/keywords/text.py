"""The keyword arguments of the calibration text."""

from __future__ import annotations

import os
from dataclasses import dataclass

from planner.api.keywords.common import Count, PathName, SequenceLength
from planner.calibration.reading.text import SEQUENCE, CalibrationText, calibration_text, longest_text, shortage
from planner.common.progress import Progress
from planner.comparison.request import Comparison
from planner.model.source import SourceModel
from vllm_moeq.format import UsageError


@dataclass(frozen=True, kw_only=True)
class TextKeywords:
    """The text that a model reads for its calibration.

    Attributes:
        data: text to calibrate on: a file of text, JSON, CSV or parquet; ``wikitext2`` or ``c4``; or a dataset of
            the Hub, ``owner/name@commit`` or ``owner/name:config@commit``.
        samples: number of calibration sequences.
        seq_len: tokens of each calibration sequence; None is 2048, or what the model can read.
    """

    data: PathName | None = None
    samples: Count = 128
    seq_len: SequenceLength | None = None

    def read_text(self, model: SourceModel, seed: int, progress: Progress) -> CalibrationText:
        """Return the text.

        Raises:
            MoeqError: no data, sequences longer than the model can read, too little text.
        """
        if self.data is None:
            raise UsageError("--data: calibration needs a text, found none; for example --data wikitext2")
        longest = longest_text(model)
        if self.seq_len is not None and self.seq_len > longest:
            raise UsageError(f"--seq-len: expected at most {longest}, the model's longest text, found {self.seq_len}")
        length = self.seq_len or min(SEQUENCE, longest)
        found = calibration_text(model.folder, os.fspath(self.data), self.samples, length, seed)
        note = shortage(found, self.samples)
        if note is not None:
            progress.line(note)
        return found


@dataclass(frozen=True, kw_only=True)
class ComparedTextKeywords(TextKeywords):
    """The same for a comparison, where each seed takes other sequences.

    Attributes:
        seq_len: tokens of each calibration sequence.
        seeds: number of random orders, and of choices of calibration sequences.
    """

    seq_len: SequenceLength = Comparison.length
    seeds: Count = Comparison.seeds
