"""Fuzz one target, guided by coverage: python -m tests.fuzz.run TARGET [libFuzzer's flags].

Without a folder for inputs it keeps them in a temporary one. A crash is written to the current folder, and
``python -m tests.fuzz.run TARGET crash-…`` runs it again. Needs atheris (requirements/cpu.txt).
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vllm_moeq.format", "planner.plan_file", "planner.text", "json"]):
    from tests.fuzz import mutators, targets


def mutator(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, int, int], bytes]:
    """Return what libFuzzer calls for the next input: bytes change, or half of the time what they stand for."""

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        generator = random.Random(seed)
        if generator.random() < 0.5:
            changed = change(data, generator)
            if changed != data and len(changed) <= limit:
                return changed
        bytes_changed: bytes = atheris.Mutate(data, limit)
        return bytes_changed

    return mutate


def main() -> None:
    target, *flags = sys.argv[1:]
    options = {"custom_mutator": mutator(mutators.MUTATORS[target])} if target in mutators.MUTATORS else {}
    with tempfile.TemporaryDirectory() as inputs:
        for number, seed in enumerate(targets.seeds(target)):
            (Path(inputs) / f"seed-{number}").write_bytes(seed)
            targets.TARGETS[target](seed)  # now: a late import would count as the time of the first input
        folders = [] if any(not flag.startswith("-") for flag in flags) else [inputs]
        arguments = [sys.argv[0], f"-max_len={targets.LIMIT}", "-timeout=10", "-rss_limit_mb=4096", *flags, *folders]
        atheris.Setup(arguments, targets.TARGETS[target], **options)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
