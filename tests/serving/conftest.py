"""Quantized and dense versions of the shipped models, made once per test run."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import MIXTRAL, MOEQ, QWEN

WIDTHS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Pair:
    """A checkpoint with packed experts, and a bfloat16 one with the same values."""

    source: Path
    quantized: Path
    dense: Path


def make_pair(source: Path, folder: Path) -> Pair:
    """Every layer has experts of every width: the first five are fixed, the others share what is left."""
    pair = Pair(source, folder / "quantized", folder / "dense")
    overrides = folder / "overrides.json"
    prefixes = json.loads(subprocess.check_output([MOEQ, "inspect", pair.source, "--json"]))["layers"]
    fixed = {f"{layer['prefix']}.{expert}": bits for layer in prefixes for expert, bits in enumerate(WIDTHS)}
    overrides.write_text(json.dumps(fixed))
    flags: list[str | Path] = ["--avg-bits", "3.25", "--bits", ",".join(map(str, WIDTHS)), "--overrides", overrides]
    subprocess.run([MOEQ, "quantize", pair.source, "-o", pair.quantized, *flags], check=True)
    subprocess.run([MOEQ, "export", pair.quantized, "-o", pair.dense], check=True)
    return pair


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(MIXTRAL, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(QWEN, tmp_path_factory.mktemp("qwen3-moe"))
