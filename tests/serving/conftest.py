"""Quantized and dense versions of the shipped models, made once per test run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
MOEQ = str(Path(sys.executable).with_name("moeq"))


@dataclass(frozen=True)
class Pair:
    """A checkpoint with packed experts, and a bfloat16 one with the same values."""

    source: Path
    quantized: Path
    dense: Path


def make_pair(name: str, folder: Path) -> Pair:
    pair = Pair(MODELS / name, folder / "quantized", folder / "dense")
    subprocess.run(
        [MOEQ, "quantize", str(pair.source), "--avg-bits", "2.5", "--bits", "1,2,3,4,8", "--linear-bits", "4"]
        + ["--method", "random", "-o", str(pair.quantized)],
        check=True,
    )
    subprocess.run([MOEQ, "export", str(pair.quantized), "-o", str(pair.dense)], check=True)
    return pair


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("stdlib-mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("stdlib-qwen3-moe", tmp_path_factory.mktemp("qwen3-moe"))
