"""``--scheme``, from a text, statistics or a plan to a checkpoint, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planner.common.units import GIB
from tests.conftest import Outcome, one_line, run_here
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.shipped import mixtral_gib
from vllm_moeq.format import GRID, load_config, verify

pytestmark = pytest.mark.slow

Run = Callable[..., Outcome]
TEXT = ("--data", CALIBRATION_TEXT, "--samples", 8, "--seq-len", 64)
TRELLIS = ("--scheme", "trellis")
GRIDS = "expected --scheme grid with it, found --scheme trellis"


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "s.safetensors"
    run_here("calibrate", MIXTRAL, *TEXT, *TRELLIS, "--for", "kl-estimated", "-o", path)
    return path


@pytest.fixture(scope="module")
def plan(stats: Path) -> Path:
    """A plan of trellises, and grids for the experts of eight bits."""
    path = stats.with_name("plan.json")
    run_here("plan", MIXTRAL, "--method", "router-norm", "--bits", "1,2,8", "--avg-bits", 2, *TRELLIS, "-o", path)
    return path


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_plan_says_the_schemes_and_quantize_obeys(moeq: Run, plan: Path, tmp_path: Path) -> None:
    made, output = content(plan), tmp_path / "out"
    for prefix, widths in made["experts"].items():
        assert made["schemes"][prefix] == ["grid" if bits == 8 else "trellis" for bits in widths]
    found = moeq("quantize", MIXTRAL, "--plan", plan, "--quantizer", "rtn", "-o", output, "--json")
    assert found.code == 0, found.err
    config = load_config(output)
    assert config.schemes == made["schemes"]
    assert config.rotation is not None
    assert content(output / "plan.json")["schemes"] == made["schemes"]
    assert "trellis by viterbi; experts in a rotated basis;" in (output / "README.md").read_text()
    assert json.loads(found.out)["sizes"]["expert_bytes"] == verify(output).expert_bytes
    counted = Counter(name for names in made["schemes"].values() for name in names)
    assert verify(output).schemes == counted
    assert f"{counted['trellis']} × trellis" in moeq("verify", output).out


def test_a_plan_of_widths_alone_takes_the_scheme(moeq: Run, tmp_path: Path) -> None:
    path, output = tmp_path / "plan.json", tmp_path / "out"
    assert moeq("plan", MIXTRAL, "--method", "uniform", "--avg-bits", 2, "-o", path).code == 0
    assert "schemes" not in content(path)
    assert moeq("quantize", MIXTRAL, "--plan", path, *TRELLIS, "-o", output).code == 0
    assert {name for names in (load_config(output).schemes or {}).values() for name in names} == {"trellis"}


def test_auto_takes_trellises_where_they_cost_less(moeq: Run, stats: Path) -> None:
    """Statistics come from a text, so the plan expects the quantizer that reads one, whose costs know both schemes."""
    flags = ("--method", "kl-estimated", "--stats", stats, "--avg-bits", 2, "--json")
    made = {
        scheme: json.loads(moeq("plan", MIXTRAL, *flags, "--scheme", scheme).out)
        for scheme in ("grid", "trellis", "auto")
    }
    objectives = {scheme: plan["cost"]["objective"] for scheme, plan in made.items()}
    assert objectives["auto"] <= objectives["trellis"] < objectives["grid"]
    assert "schemes" not in made["grid"]
    for plan in made.values():
        assert plan["achieved_avg_bits"] <= 2


def test_a_text_becomes_a_checkpoint_of_trellises(moeq: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ("--method", "kl-estimated", "--scheme", "auto", "--avg-bits", 2)
    made = moeq("quantize", MIXTRAL, *TEXT, *flags, "-o", output)
    assert made.code == 0, made.err
    assert (
        "gains of trellis codes: not measured, since no expert gets 256 tokens of the text, hence taken as 1"
        in made.err
    )
    assert verify(output).average_bits <= 2
    assert load_config(output).schemes is not None


def test_auto_fills_a_budget(moeq: Run, stats: Path, tmp_path: Path) -> None:
    """The plan is kept in the unfinished folder, with the average that the budget allows for each scheme."""
    budget = mixtral_gib(2.25)
    flags = ("--method", "kl-estimated", "--stats", stats, "--budget-gib", budget, "--scheme", "auto", *TEXT[:2])
    made = moeq("quantize", MIXTRAL, *flags, "--samples", 4, "--seq-len", 64, "-o", tmp_path / "out", "--json")
    assert made.code == 0, made.err
    assert 0.95 * budget < json.loads(made.out)["sizes"]["total_bytes"] / GIB <= budget
    assert content(tmp_path / "out" / "plan.json")["schemes"]


def test_a_budget_gives_trellises_more_bits(moeq: Run) -> None:
    budget = mixtral_gib(2.25)
    flags = ("--method", "router-norm", "--budget-gib", budget, "--dry-run", "--json")
    grid, trellis = (json.loads(moeq("plan", MIXTRAL, *flags, "--scheme", it).out) for it in ("grid", "trellis"))
    assert trellis["achieved_avg_bits"] > grid["achieved_avg_bits"]
    for found in (grid, trellis):
        assert 0.85 * budget < found["sizes"]["total_bytes"] / GIB <= budget


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not get slower while others work on it."""
    monkeypatch.setattr("planner.estimates.seconds._rate", lambda _bits, scheme, *_: 1e6 if scheme is GRID else 1e5)
    monkeypatch.setattr("planner.estimates.seconds._product_rate", lambda _: 1e9)


@pytest.mark.usefixtures("steady")
def test_what_is_not_known_yet_is_estimated_by_its_largest(moeq: Run, tmp_path: Path) -> None:
    flags = (*TEXT, "--method", "kl-estimated", "--avg-bits", 2, "--dry-run", "--json", "-o", tmp_path / "out")
    found = {
        scheme: json.loads(moeq("quantize", MIXTRAL, *flags, "--scheme", scheme).out)
        for scheme in ("grid", "trellis", "auto")
    }
    assert found["auto"]["sizes"] == found["grid"]["sizes"]
    assert found["trellis"]["sizes"]["total_bytes"] < found["grid"]["sizes"]["total_bytes"]
    seconds = {scheme: it["needs"]["seconds"] for scheme, it in found.items()}
    assert seconds["grid"] < seconds["trellis"] == pytest.approx(seconds["auto"], rel=0.1)


@pytest.mark.usefixtures("steady")
def test_a_comparison_counts_the_search(moeq: Run, tmp_path: Path) -> None:
    flags = ("--methods", "uniform", "--avg-bits", 2, "--held-out", CALIBRATION_TEXT, "--max-tokens", 64, "--dry-run")
    seconds = [
        json.loads(moeq("compare", MIXTRAL, *flags, "--json", "--scheme", it, "-o", tmp_path / "out").out)["needs"]
        for it in ("grid", "grid,trellis")
    ]
    assert seconds[0]["seconds"] < seconds[1]["seconds"]
    assert seconds[0]["written_bytes"] < seconds[1]["written_bytes"]


COMPARED = ("--held-out", CALIBRATION_TEXT, "--max-tokens", 64, *TEXT, "--quantizer", "gptq", "--avg-bits", 2)


def test_a_method_that_measures_no_schemes_is_left_out(moeq: Run, tmp_path: Path) -> None:
    flags = ("--methods", "kl-estimated,uniform,slim", "--scheme", "grid,auto", *COMPARED, "--dry-run")
    found = moeq("compare", MIXTRAL, *flags, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    left_out = [line for line in found.err.splitlines() if "not with --scheme" in line]
    assert left_out == [f"{it}: not with --scheme auto, which it does not measure" for it in ("uniform", "slim")]
    refused = one_line(moeq("compare", MIXTRAL, "--methods", "uniform,pmq", "--scheme", "auto", *COMPARED, "-o", "x"))
    assert refused == "error: --scheme auto: expected --methods with kl or kl-estimated, found uniform,pmq"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--scheme", "auto"), "--scheme auto: expected --method kl or kl-estimated with --quantizer gptq"),
        (("--scheme", "hexagon"), "--scheme"),
        (
            (*TRELLIS, "--zero-points", "integer"),
            f"--zero-points: {GRIDS}",
        ),
        ((*TRELLIS, "--one-bit", "rtn"), f"--one-bit: {GRIDS}"),
        (
            (*TRELLIS, "--bits", "8", "--avg-bits", "8"),
            "--scheme trellis: expected --bits with some of 1, 2, 3, 4, found 8",
        ),
    ],
)
def test_what_no_scheme_takes_is_refused(moeq: Run, tmp_path: Path, flags: tuple[str, ...], reason: str) -> None:
    assert reason in one_line(moeq("quantize", MIXTRAL, *flags, "-o", tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_plan_with_schemes_leaves_none_to_choose(moeq: Run, plan: Path, tmp_path: Path) -> None:
    found = one_line(moeq("quantize", MIXTRAL, "--plan", plan, "--scheme", "grid", "-o", tmp_path / "out"))
    assert found == f"error: --scheme: expected none, as {plan} gives experts their schemes, found grid"


def test_a_plan_may_be_said_again(moeq: Run, plan: Path, tmp_path: Path) -> None:
    same = ("quantize", MIXTRAL, "--plan", plan, "--quantizer", "rtn", *TRELLIS, "--dry-run")
    assert moeq(*same, "-o", tmp_path / "out").code == 0


def test_auto_needs_a_plan_that_chose(moeq: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert moeq("plan", MIXTRAL, "--method", "uniform", "--avg-bits", 2, "-o", path).code == 0
    found = one_line(moeq("quantize", MIXTRAL, "--plan", path, "--scheme", "auto", "-o", tmp_path / "out"))
    assert "--scheme auto: expected a plan with schemes" in found
    assert found.endswith(f"found none in {path}")


def test_statistics_of_grids_are_not_enough(moeq: Run, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    assert moeq("calibrate", MIXTRAL, *TEXT, "--for", "kl-estimated", "-o", path).code == 0
    found = one_line(moeq("plan", MIXTRAL, "--method", "kl-estimated", "--stats", path, *TRELLIS))
    assert "found no gain_rotated_1," in found
    assert found.endswith("make them with moeq calibrate --for kl-estimated --bits 1,2,3,4 --scheme trellis")


def test_a_model_whose_experts_fill_no_tiles_is_refused(moeq: Run, narrow_mixtral: Path, tmp_path: Path) -> None:
    for command in (("quantize",), ("plan",), ("compare", *TEXT, "--held-out", CALIBRATION_TEXT)):
        found = one_line(moeq(*command, narrow_mixtral, *TRELLIS, "-o", tmp_path / "out"))
        assert "expected an input dimension that is a multiple of 32" in found


def test_trellises_need_no_group_size(moeq: Run, tiny_mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert moeq("plan", tiny_mixtral, *TRELLIS, "-o", path).code == 0
    assert moeq("quantize", tiny_mixtral, "--plan", path, "-o", tmp_path / "planned", "--dry-run").code == 0
    assert moeq("quantize", tiny_mixtral, *TRELLIS, "-o", tmp_path / "out", "--dry-run").code == 0
    found = one_line(moeq("quantize", tiny_mixtral, *TRELLIS, "--bits", "2,8", "-o", tmp_path / "out", "--dry-run"))
    assert "multiple of 128 (--group-size)" in found


@pytest.mark.parametrize("flag", ["--group-size=64", "--one-bit=rtn", "--zero-points=integer"])
def test_a_flag_of_grids_beside_a_plan_of_trellises(moeq: Run, tmp_path: Path, flag: str) -> None:
    path = tmp_path / "plan.json"
    assert moeq("plan", MIXTRAL, *TRELLIS, "-o", path).code == 0
    found = one_line(moeq("quantize", MIXTRAL, "--plan", path, flag, "-o", tmp_path / "out"))
    said = f"expected --scheme grid with it, found --plan {path}, which says how each expert is stored"
    assert found.endswith(f"{flag.split('=')[0]}: {said}")


def test_an_average_that_is_no_width_is_estimated(moeq: Run, tmp_path: Path) -> None:
    flags = ("--methods", "router-norm", "--bits", "4,8", "--avg-bits", 5, "--held-out", CALIBRATION_TEXT)
    assert moeq("compare", MIXTRAL, *flags, "--dry-run", "-o", tmp_path / "out").code == 0


def test_a_text_of_blanks_is_refused(moeq: Run, tmp_path: Path) -> None:
    text = tmp_path / "blank.txt"
    text.write_text(" \n" * 50)
    found = one_line(moeq("quantize", MIXTRAL, "--data", text, "-o", tmp_path / "out"))
    assert found.endswith(f"--data {text}: expected a text, found none: the file is empty, or has blanks alone")


def test_eight_bits_are_no_trellis(moeq: Run, tiny_mixtral: Path, tmp_path: Path) -> None:
    flags = ("--method", "router-norm", "--bits", "4,8", "--avg-bits", 8, "--group-size", 32, *TRELLIS)
    said = moeq("quantize", tiny_mixtral, *flags, "-o", tmp_path / "out")
    assert said.code == 0
    assert "no expert is stored as a trellis, which has the widths 1, 2, 3, 4: all are grids" in said.err
