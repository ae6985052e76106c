"""What a peer's process gets and gives. Only the standard library is imported: each peer has its own environment."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PLACES = ("gate", "up", "down")
"""The matrices of an expert. A matrix is known by ``layer.expert.place`` in all files that processes exchange."""

MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\..*\bexperts\.(\d+)\.(gate|up|down)_proj$")


@dataclass(frozen=True)
class Job:
    """Work for a peer.

    Attributes:
        model: folder of the model, 16 bits.
        experts: file of all expert matrices, float32 [outputs, inputs].
        tokens: file with the calibration text, ``tokens`` int64 [sequences, length].
        importance: file with the mean square of each input of each expert matrix, float32 [inputs].
        output: file for the dequantized matrices, float32, under the same names.
        bits: width of the codes.
        group: weights per scale.
        options: what the peer's process understands besides.
    """

    model: str
    experts: str
    tokens: str
    importance: str
    output: str
    bits: int
    group: int
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the job to a file."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def facts(self) -> Path:
        """Return the file for seconds and versions."""
        return Path(self.output).with_suffix(".json")

    def finish(self, seconds: float, packages: Sequence[str]) -> None:
        """Write how long the quantization took, and the versions of the packages that decide its result."""
        found = {"seconds": seconds, "versions": {name: importlib.metadata.version(name) for name in packages}}
        self.facts().write_text(json.dumps(found), encoding="utf-8")


def read_job() -> Job:
    """Return the job in the file that the command line names."""
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def matrix_name(module: str) -> str | None:
    """Return the name of an expert matrix by that of its module in transformers, None for another module."""
    match = MODULE.search(module)
    return None if match is None else ".".join(match.groups())
