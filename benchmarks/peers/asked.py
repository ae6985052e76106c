"""The flags that decide results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.model.source import SourceModel


@dataclass(frozen=True)
class Asked:
    """The flags that decide results.

    Attributes:
        model: the model's folder.
        data: calibration text.
        samples: sequences of it.
        length: tokens of each.
        held_out: the text to predict.
        max_tokens: number of its tokens, None for all.
    """

    model: Path
    data: Path
    samples: int
    length: int
    held_out: Path
    max_tokens: int | None

    def facts(self) -> dict[str, Any]:
        """Return what a result belongs to."""
        with SourceModel(self.model) as model:
            found = model.fingerprint()
        texts = {"data": self.data.name, "held_out": self.held_out.name}
        return {"model": self.model.name, "fingerprint": found, **texts, "samples": self.samples,
                "length": self.length, "max_tokens": self.max_tokens}  # fmt: skip
