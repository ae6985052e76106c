"""Everything that knows which widths there are knows those of the table, ``BIT_WIDTHS``, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

import vllm_moeq
from planner.commands.show import COLOURS
from planner.reporting.palette import DARK, LIGHT
from tests.matches import first_match
from vllm_moeq.format import BIT_WIDTHS, GRID, pack, parse_config, unpack
from vllm_moeq.format.errors import ConfigError
from vllm_moeq.format.fields import Bits
from vllm_moeq.kernels.cpu import build

TABLE = set(BIT_WIDTHS)
NUMBERS = range(-1, 17)
PACKAGE = Path(vllm_moeq.__file__).parent
FORMAT = PACKAGE.parent / "docs" / "format.md"
CPP = PACKAGE / "kernels" / "cpu" / "csrc"
IN_WORDS = f"{', '.join(map(str, BIT_WIDTHS[:-1]))} or {BIT_WIDTHS[-1]}"
"""The widths as prose has them: 1, 2, 3, 4 or 8."""


def accepted(call: Any, *errors: type[Exception]) -> set[int]:
    """Return the numbers that a function takes without one of these errors."""
    found = set()
    for number in NUMBERS:
        try:
            call(number)
        except errors:
            continue
        found.add(number)
    return found


def test_the_table_is_ascending() -> None:
    assert list(BIT_WIDTHS) == sorted(TABLE)


def test_the_schema() -> None:
    assert accepted(TypeAdapter(Bits).validate_python, ValidationError) == TABLE
    assert TypeAdapter(Bits).json_schema()["enum"] == list(BIT_WIDTHS)
    with pytest.raises(ValidationError, match=f"should be {IN_WORDS}"):
        TypeAdapter(Bits).validate_python(0)
    for equal in (True, 2.0, "2"):
        with pytest.raises(ValidationError):
            TypeAdapter(Bits).validate_python(equal)


@pytest.mark.parametrize(("average", "known"), [(min(TABLE), True), (max(TABLE), True), (0.9, False), (8.1, False)])
def test_averages_lie_between_the_widths(average: float, known: bool) -> None:
    plan = {"method": "x", "avg_bits": float(average), "achieved_avg_bits": float(average), "bit_choices": [1]}
    config = {
        "quant_method": "moeq",
        "format_version": 1,
        "group_size": 32,
        "projections": {"gate": "w1", "up": "w3", "down": "w2"},
        "experts": {"a": [1]},
        "linear": {"bits": 16},
        "unquantized": [],
        "plan": plan,
    }
    if known:
        parse_config(config, "test")
    else:
        with pytest.raises(ConfigError, match="avg_bits"):
            parse_config(config, "test")


def test_packing() -> None:
    codes = torch.zeros((1, 32), dtype=torch.uint8)
    assert accepted(lambda bits: pack(codes, bits), ValueError) == TABLE
    assert (
        accepted(lambda bits: unpack(torch.zeros((1, max(bits, 0)), dtype=torch.int32), bits, 32), ValueError) == TABLE
    )


def test_the_pages_of_the_format() -> None:
    row = first_match(r"^\| `experts` \|.*$", FORMAT)[0]
    assert row.endswith(f"{IN_WORDS} |")


def test_the_fused_kernel() -> None:
    """Its interpreter is asked for in ``tests/conftest.py``; ``tests/kernels`` runs every width."""
    from vllm_moeq.kernels.triton.codings import CODINGS
    from vllm_moeq.kernels.triton.fields import PTX

    assert {width for _, width, _, _ in PTX} == TABLE
    for (_, width, _, _), text in PTX.items():
        assert max(int(register) for register in re.findall(r"\$(\d+)", text)) <= width, f"{width} bits: {text}"
    assert {coding.width for coding in CODINGS if coding.scheme == GRID} == TABLE


def test_the_sources_of_the_cpu_kernel() -> None:
    for pattern in (r"case (\d+):", r"case (\d+): return multiply_panel<\1, DIGITS>"):
        assert {int(bits) for bits in re.findall(pattern, (CPP / "panel.h").read_text())} == TABLE
    assert f'"expected {IN_WORDS} bits, found "' in (CPP / "linear.cpp").read_text()


@pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there")
def test_the_compiled_cpu_kernel() -> None:
    x = torch.zeros(1, 32)

    def run(bits: int) -> None:
        # One panel of 32 rows: two blocks, each with 16 scales and zeros of 16 bits, and a vector of 64 bytes per bit.
        weight = torch.zeros(2 * (64 + max(bits, 0) * 64), dtype=torch.uint8)
        torch.ops.vllm_moeq.native_linear(x, weight, 32, bits, 32, False, -1)

    assert accepted(run, RuntimeError) == TABLE


def test_the_colours_of_reports() -> None:
    """What is shown by width: the terminal, the page and the figures."""
    for shown in (COLOURS, LIGHT.widths, DARK.widths):
        assert set(shown) == TABLE
