"""Arguments that cannot be are refused before any work, in one line that names them."""

# mypy: warn-unused-ignores

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import planner
from planner import MoeqError, UsageError
from planner.api.keywords.comparison import CandidateKeywords, MeasureKeywords
from planner.api.keywords.widths import read_average, read_choices

REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (planner.plan, {"samples": 0}, "--samples: expected a number greater than or equal to 1, found 0"),
    (planner.plan, {"seq_len": 3}, "--seq-len: expected a number greater than or equal to 16, found 3"),
    (planner.plan, {"samples": "many"}, "--samples: expected a valid integer, unable to parse string as an integer, "),
    (planner.plan, {"stats": 3}, "--stats: expected a valid string, found 3"),
    (planner.plan, {"stats": ""}, "--stats: expected a value, found an empty one"),
    (planner.plan, {"progress": 3}, "--progress: expected"),
    (planner.plan, {"samples": 4}, "--samples: expected --data TEXT with it, found none"),
    (planner.plan, {"method": "kl", "zeta": 4}, "reads it (router-norm-maxvar) with it, found --method kl"),
    (planner.plan, {"context": 3}, "--context: expected --dry-run, or --preset 24gb or 80gb, with it, found none"),
    (planner.quantize, {"output": "o", "plan": "p", "bits": (1, 2)}, "--bits: expected no plan with it, found --plan"),
    (planner.quantize, {"output": "o", "bits": (2, 3), "one_bit": "rtn"}, "that have 1 with it, found --bits 2,3"),
    (planner.quantize, {"output": "o", "compat": True}, "--compat: expected --quantizer gptq with it, found"),
    (planner.compare, {"output": "o", "held_out": "h", "methods": ("uniform",), "bits": [3]}, "--methods uniform"),
    (planner.compare, {"output": "o", "held_out": "h", "methods": ("one",)}, "--methods: expected some of "),
    (planner.evaluate, {"data": "d", "limit": 3}, "--limit: expected tasks with it, found none"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "message"), REFUSED)
def test_impossible_arguments_are_refused(function: Callable[..., Any], arguments: Any, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        function("/none/such", **arguments)
    assert message in str(refused.value)


def test_an_argument_with_its_default_is_as_good_as_none() -> None:
    with pytest.raises(UsageError, match="none/such: expected a model folder"):
        planner.quantize("/none/such", output="o", plan="p", method="auto", zeta=3.0, samples=128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"avg_bit": 2.5}, "got an unexpected keyword argument 'avg_bit'"),
        ({"dry_run": True}, "got an unexpected keyword argument 'dry_run'"),
    ],
)
def test_an_unknown_argument_is_a_type_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        planner.plan("/none/such", **arguments)


def test_type_checkers_know_the_arguments() -> None:
    """The comments would be errors if mypy, which ``make lint`` runs, took these calls."""
    with pytest.raises(TypeError, match="missing a required argument: 'output'"):
        planner.quantize("/none/such")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'avg_bit'"):
        planner.quantize("/none/such", output="o", avg_bit=2.5)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="--promotion: expected 'official' or 'stable', found 'paper'"):
        planner.plan("/none/such", promotion="paper")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing a required argument: 'output'"):
        planner.estimate(planner.compare, "/none/such", held_out="h")  # type: ignore[call-arg]


def test_estimates_know_their_functions(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="expected one of the functions plan, quantize, calibrate, compare, evaluate, found"
    ):
        planner.estimate(planner.report, tmp_path)
    with pytest.raises(UsageError, match="none/such: expected a model folder"):
        planner.estimate(planner.plan, "/none/such", context=3)


@pytest.mark.parametrize("given", [2.5, "2.5", Fraction(5, 2), Fraction("2.5")])
def test_an_average_is_exact(given: float | str | Fraction) -> None:
    assert read_average(given) == Fraction(5, 2)


@pytest.mark.parametrize("given", [0.9, 9, "9", "many", float("nan"), float("inf"), Fraction(1, 3), "1e999999999"])
def test_other_averages_are_refused(given: float | str | Fraction) -> None:
    with pytest.raises(UsageError, match=r"--avg-bits: expected a number between 1 and 8, found '?[0-9nmi]"):
        read_average(given)


def test_digits_count_not_their_nearest_float() -> None:
    assert read_average(2.1) == Fraction(21, 10)
    assert read_average(Fraction(7, 3)) == Fraction(7, 3)


@pytest.mark.parametrize("given", ["1,2,3", (1, 2, 3), [3, 2, 1], range(1, 4)])
def test_widths_come_as_text_or_values(given: Any) -> None:
    assert read_choices(given) == (1, 2, 3)


def test_lists_of_a_comparison_come_as_text_or_values() -> None:
    for methods, averages, odp in (("kl,pmq", "2,2.5", "0.3"), (("kl", "pmq"), (2, 2.5), 0.3)):
        asked, measured = CandidateKeywords(methods=methods, avg_bits=averages), MeasureKeywords(odp=odp)
        assert (asked.names(), asked.averages()) == (("kl", "pmq"), (Fraction(2), Fraction(5, 2)))
        assert measured.thresholds() == (0.3,)
    assert CandidateKeywords(avg_bits=Fraction(7, 3)).averages() == (Fraction(7, 3),)


def test_importing_planner_is_cheap() -> None:
    code = (
        "import sys, planner\n"
        "assert not {'torch', 'typer', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert callable(planner.report) and {*planner.__all__} <= {*dir(planner)}\n"
        "assert 'torch' in sys.modules and 'typer' not in sys.modules\n"
        "import planner.api.planning\n"
        "assert callable(planner.plan)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there() -> None:
    assert all(getattr(planner, name).__name__ == name for name in planner.__all__)
    assert issubclass(planner.UsageError, MoeqError)
    with pytest.raises(AttributeError, match="module 'planner' has no attribute 'nonsense'"):
        planner.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_help_shows_what_is_needed_first() -> None:
    signature = inspect.signature(planner.quantize)
    assert list(signature.parameters)[:3] == ["model", "output", "plan"]
    assert signature.return_annotation is planner.Quantized
    assert "Annotated" not in str(signature)
