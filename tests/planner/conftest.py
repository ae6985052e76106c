"""Checkpoints that GPTQ's format can hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.common.progress import Progress
from planner.exchange.autogptq import export_gptq
from tests.by_hand import quantize_by_hand

WIDTHS = (2, 3, 4, 8)
QUIET = Progress(quiet=True)


@pytest.fixture(scope="session")
def integer_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that quantizes a model with integer zero points, experts in turn to 2, 3, 4 and 8 bits."""

    def make(source: Path, quantizer: str, linear_bits: int, group_size: int, *, mixed_linears: bool = False) -> Path:
        return quantize_by_hand(
            source, tmp_path_factory.mktemp("integer") / source.name,
            lambda layer: [WIDTHS[(expert + layer.index) % 4] for expert in range(layer.num_experts)],
            quantizer=quantizer, one_bit="sign", linear_bits=linear_bits, group_size=group_size, zero_points="integer",
            mixed_linears=mixed_linears,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def integer_mixtral(tiny_mixtral: Path, integer_checkpoint: Callable[..., Path]) -> Path:
    """The tiny Mixtral, group size 32, with packed linears; not to be changed."""
    return integer_checkpoint(tiny_mixtral, "hqq", 4, 32)


@pytest.fixture(scope="session")
def gptq_mixtral(integer_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export; not to be changed."""
    output = tmp_path_factory.mktemp("gptq") / "mixtral"
    export_gptq(integer_mixtral, output, "v2", QUIET)
    return output


@pytest.fixture
def integer_copy(integer_mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(integer_mixtral, tmp_path / "integer-copy"))


@pytest.fixture
def gptq_copy(gptq_mixtral: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gptq_mixtral, tmp_path / "gptq-copy"))
