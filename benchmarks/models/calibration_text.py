"""This script writes benchmarks/models/calibration.jsonl: code like the shipped models' training text, but not of it.

A model that has seen its calibration text is surer there than it will be at work.

PYTHONPATH=. python benchmarks/models/calibration_text.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.models.corpus import read_calibration

CHARACTERS = 300_000
LENGTHS = range(2_000, 20_000)


def main() -> None:
    """Draw whole files of middling length until there is enough text."""
    texts = read_calibration()
    random.Random(0).shuffle(texts)
    chosen, total = [], 0
    for text in texts:
        if len(text) in LENGTHS and total <= CHARACTERS:
            chosen.append(text)
            total += len(text)
    path = Path(__file__).with_name("calibration.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
