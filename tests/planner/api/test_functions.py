"""The functions do what the commands do, return what --json prints, and print nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import planner
from planner.plan_file import read_plan
from tests.conftest import Outcome, one_line
from tests.folders import contents
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.format import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Moeq = Callable[..., Outcome]

HELD_OUT = MIXTRAL / "held_out.txt"
TEXT: dict[str, Any] = {"data": CALIBRATION_TEXT, "samples": 4, "seq_len": 64}
EXPERT = "model.layers.0.block_sparse_moe.experts.3"


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Refuse anything that the test's function prints, from Python or from below it."""
    capfd.readouterr()
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> planner.Quantized:
    """The shipped Mixtral at two bits, in a folder that is not to be changed."""
    return planner.quantize(MIXTRAL, avg_bits=2, output=tmp_path_factory.mktemp("api") / "2bit")


@pytest.fixture
def checkpoint(written: planner.Quantized, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.output, tmp_path / "2bit"))


def without_measurements(found: Any) -> Any:
    """Return JSON values without seconds and bytes of memory, which no two runs share."""
    if isinstance(found, dict):
        left = {name: without_measurements(value) for name, value in found.items()}
        return {name: value for name, value in left.items() if name not in ("cost", "seconds", "ram_bytes")}
    return [without_measurements(value) for value in found] if isinstance(found, list) else found


SIZES = "achieved_avg_bits sizes"
KEYS = {
    "plan": "version method bit_choices avg_bits achieved_avg_bits experts order scores promoted near_ties settings "
    "source cost sizes",
    "quantize": f"{SIZES} output experts",
    "calibrate": "output calibration tokens",
    "eval": "model data sha256 window tokens perplexity perplexity_error",
    "report": "report pictures source average_bits widths promoted fallbacks bytes total_bytes half_precision_bytes "
    "source_bytes grids missing evaluation",
    "dry plan": f"{SIZES} needs serving",
    "dry quantize": f"{SIZES} needs serving",
    "dry eval": "needs",
    "dry compare": "needs",
}
"""Command → the keys of what it prints as JSON, which scripts rely on."""


def same(found: Any, outcome: Outcome, keys: str) -> None:
    """Compare a result with what a command has printed as JSON, and its keys with those that scripts know."""
    assert outcome.code == 0, outcome.err
    assert list(json.loads(outcome.out)) == KEYS[keys].split()
    assert without_measurements(json.loads(json.dumps(found))) == without_measurements(json.loads(outcome.out))


@pytest.mark.usefixtures("silent")
def test_a_plan(tmp_path: Path) -> None:
    fixed = {EXPERT: 3}
    made = planner.plan(MIXTRAL, avg_bits=2.25, bits=(1, 2, 3), overrides=fixed, output=tmp_path / "plan.json", **TEXT)
    assert made.plan.method == "kl"
    assert made.achieved_avg_bits == 2.25
    assert made.plan.experts[EXPERT.removesuffix(".3")][3] == 3
    assert read_plan(tmp_path / "plan.json") == made.plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_is_the_commands(moeq: Moeq, tmp_path: Path) -> None:
    (tmp_path / "fixed.json").write_text(json.dumps({EXPERT: 3}))
    flags = ("--method", "uniform", "--avg-bits", 3, "--bits", "2,3", "--overrides", tmp_path / "fixed.json")
    made = planner.plan(MIXTRAL, method="uniform", avg_bits=3, bits=(2, 3), overrides={EXPERT: 3})
    same(made.as_dict(), moeq("plan", MIXTRAL, *flags, "--json"), "plan")


@pytest.mark.usefixtures("silent")
def test_statistics(tmp_path: Path) -> None:
    made = planner.calibrate(MIXTRAL, methods=("frequency",), output=tmp_path / "stats.safetensors", **TEXT)
    assert {len(counts) for counts in made.tokens.values()} == {8}
    planned = planner.plan(MIXTRAL, method="frequency", stats=made.output)
    assert planned.plan.settings.stats is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.json", "stats.safetensors"]


def test_statistics_are_the_commands(moeq: Moeq, tmp_path: Path) -> None:
    made = planner.calibrate(MIXTRAL, methods="frequency", output=tmp_path / "one.safetensors", **TEXT)
    text = ("--data", TEXT["data"], "--samples", TEXT["samples"], "--seq-len", TEXT["seq_len"])
    outcome = moeq("calibrate", MIXTRAL, "--for", "frequency", *text, "-o", tmp_path / "two.safetensors", "--json")
    same({**made.as_dict(), "output": str(tmp_path / "two.safetensors")}, outcome, "calibrate")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.usefixtures("silent")
def test_a_checkpoint(written: planner.Quantized, tmp_path: Path) -> None:
    made = planner.quantize(
        str(MIXTRAL), plan=planner.Planned(written.plan, written.sizes), output=str(tmp_path / "again")
    )
    assert verify(made.output).experts == MIXTRAL_SIZES.all_experts
    assert made.output == tmp_path / "again"
    assert made.achieved_avg_bits == 2.0
    assert made.serve == f"moeq serve {made.output}"
    assert made.sizes == written.sizes
    assert contents(made.output)["config.json"] == contents(written.output)["config.json"]


def test_a_checkpoint_is_the_commands(moeq: Moeq, written: planner.Quantized, tmp_path: Path) -> None:
    outcome = moeq("quantize", MIXTRAL, "--avg-bits", 2, "-o", tmp_path / "2bit", "--json")
    same({**written.as_dict(), "output": str(tmp_path / "2bit")}, outcome, "quantize")
    of_function, of_command = contents(written.output), contents(tmp_path / "2bit")
    assert {name for name in of_function if of_function[name] != of_command.get(name)} <= {"plan.json"}


@pytest.mark.usefixtures("silent")
def test_an_evaluation(checkpoint: Path) -> None:
    found = planner.evaluate(checkpoint, data=HELD_OUT, reference=MIXTRAL, window=64, max_tokens=512)
    assert found.perplexity is not None
    assert found.kl is not None
    assert found.perplexity > 10
    assert 0 < found.kl.mean < 5
    assert "evaluation.json" in contents(checkpoint)


def test_an_evaluation_is_the_commands(moeq: Moeq, checkpoint: Path) -> None:
    found = planner.evaluate(str(checkpoint), data=str(HELD_OUT), window=64, max_tokens=256, save=False)
    flags = ("--data", HELD_OUT, "--window", 64, "--max-tokens", 256, "--no-save", "--json")
    same(found.as_dict(), moeq("eval", checkpoint, *flags), "eval")
    assert "evaluation.json" not in contents(checkpoint)


@pytest.mark.usefixtures("silent")
def test_a_comparison(tmp_path: Path) -> None:
    found = planner.compare(
        MIXTRAL, methods=("uniform", "router-norm"), avg_bits=(2, 2.5), held_out=HELD_OUT, window=64, max_tokens=256,
        output=tmp_path / "comparison",
    )  # fmt: skip
    assert [(row["method"], row["average"]) for row in found.rows] == [
        ("original", 16), ("uniform", 2), ("router-norm", 2), ("router-norm", 2.5)
    ]  # fmt: skip
    assert json.loads((found.output / "compare.json").read_text()) == json.loads(json.dumps(found.as_dict()))


@pytest.mark.usefixtures("silent")
def test_a_report(checkpoint: Path, tmp_path: Path) -> None:
    made = planner.report(checkpoint, output=tmp_path / "page.html", png=False)
    assert made.report == tmp_path / "page.html"
    assert made.facts.average_bits == 2
    assert "<html" in made.report.read_text()


def test_a_report_is_the_commands(moeq: Moeq, checkpoint: Path) -> None:
    same(planner.report(checkpoint, png=False).as_dict(), moeq("report", checkpoint, "--no-png", "--json"), "report")


@pytest.mark.usefixtures("silent")
def test_an_estimate_writes_nothing(tmp_path: Path) -> None:
    found = planner.estimate(planner.quantize, MIXTRAL, avg_bits=2, output=tmp_path / "out", gpu_gib=16.0)
    assert found.achieved_avg_bits == 2
    assert found.serving is not None
    assert (found.serving.gpus, found.serving.gpu_gib) == (1, 16.0)
    assert found.needs.written_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_estimates_are_the_commands(moeq: Moeq, tmp_path: Path) -> None:
    same(planner.estimate(planner.plan, MIXTRAL).as_dict(), moeq("plan", MIXTRAL, "--dry-run", "--json"), "dry plan")
    out, text = tmp_path / "out", ("--data", HELD_OUT, "--max-tokens", 256)
    found = planner.estimate(planner.quantize, MIXTRAL, output=out)
    same(found.as_dict(), moeq("quantize", MIXTRAL, "-o", out, "--dry-run", "--json"), "dry quantize")
    found = planner.estimate(planner.evaluate, MIXTRAL, data=HELD_OUT, max_tokens=256)
    same(found.as_dict(), moeq("eval", MIXTRAL, *text, "--dry-run", "--json"), "dry eval")
    found = planner.estimate(planner.compare, MIXTRAL, methods=["uniform"], avg_bits=2, held_out=HELD_OUT, output=out)
    flags = ("--methods", "uniform", "--avg-bits", 2, "--held-out", HELD_OUT, "-o", out)
    same(found.as_dict(), moeq("compare", MIXTRAL, *flags, "--dry-run", "--json"), "dry compare")


def test_notes_and_progress_go_to_the_caller(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[planner.Event] = []
    planner.quantize(MIXTRAL, avg_bits=2, output=tmp_path / "out", progress=heard.append)
    assert str(heard[0]).startswith("method auto: no calibration given, so router-norm-maxvar")
    shares = [0.0 if event.done is None else event.done for event in heard]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1
    assert capfd.readouterr() == ("", "")
    planner.estimate(planner.plan, MIXTRAL, **{**TEXT, "data": HELD_OUT, "samples": 4000}, progress=heard.append)
    assert str(heard[-2]).startswith("note: held_out.txt holds ")
    assert capfd.readouterr() == ("", "")
    planner.plan(MIXTRAL, progress=print)
    assert capfd.readouterr().out.startswith("method auto: ")


LONG = "x" * 300
"""A name that no file can have."""

MISTAKES: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (planner.plan, ("plan", MIXTRAL, "--avg-bits", 9), {"model": MIXTRAL, "avg_bits": "9"}),
    (planner.plan, ("plan", MIXTRAL, "--stats", "none"), {"model": MIXTRAL, "stats": "none"}),
    (planner.plan, ("plan", MIXTRAL, "-o", "none/p"), {"model": MIXTRAL, "output": "none/p"}),
    (planner.quantize, ("quantize", MIXTRAL, "-o", "there"), {"model": MIXTRAL, "output": "there"}),
    (
        planner.quantize,
        ("quantize", MIXTRAL, "-o", "new", "--plan", "none"),
        {"model": MIXTRAL, "output": "new", "plan": "none"},
    ),
    (
        planner.quantize,
        ("quantize", MIXTRAL, "-o", "new", "--quantizer", "gptq"),
        {"model": MIXTRAL, "output": "new", "quantizer": "gptq"},
    ),
    (
        planner.calibrate,
        ("calibrate", MIXTRAL, "-o", "new", "--for", "uniform", "--data", HELD_OUT),
        {"model": MIXTRAL, "output": "new", "methods": ["uniform"], "data": HELD_OUT},
    ),
    (planner.evaluate, ("eval", MIXTRAL), {"model": MIXTRAL}),
    (planner.evaluate, ("eval", "none", "--data", HELD_OUT), {"model": "none", "data": HELD_OUT}),
    (
        planner.compare,
        ("compare", MIXTRAL, "--held-out", HELD_OUT, "-o", "new", "--methods", "kl"),
        {"model": MIXTRAL, "held_out": HELD_OUT, "output": "new", "methods": ("kl",)},
    ),
    (planner.report, ("report", "none"), {"folder": "none"}),
    (planner.plan, ("plan", LONG), {"model": LONG}),
    (planner.quantize, ("quantize", MIXTRAL, "-o", LONG), {"model": MIXTRAL, "output": LONG}),
]


@pytest.mark.parametrize(("function", "line", "arguments"), MISTAKES)
def test_a_mistake_is_told_as_the_command_tells_it(
    moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, line: Any, arguments: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(planner.MoeqError) as refused:
        function(**arguments)
    assert one_line(moeq(*line)) == f"error: {refused.value}"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_jobs_do_not_run_the_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import planner\nprint(planner.quantize({str(MIXTRAL)!r}, avg_bits=2, jobs=2, output='out').serve)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "moeq serve out\n", "")


def test_fixed_widths_are_checked() -> None:
    with pytest.raises(planner.ConfigError, match=r"^--overrides: nobody: the model has no such expert"):
        planner.plan(MIXTRAL, overrides={"nobody": 3})
    with pytest.raises(planner.ConfigError, match=r"expected a width among --bits \[1, 2, 3\], found 8"):
        planner.plan(MIXTRAL, overrides={EXPERT: 8})


def test_a_plan_of_another_model_is_refused(written: planner.Quantized, tiny_qwen3_moe: Path, tmp_path: Path) -> None:
    with pytest.raises(planner.ConfigError, match=r"^--plan: model.layers.0.mlp.experts: expected 4 widths, found 0"):
        planner.quantize(tiny_qwen3_moe, plan=written.plan, group_size=64, output=tmp_path / "out")


def test_a_plan_in_no_file_has_a_name_in_messages(written: planner.Quantized, tmp_path: Path) -> None:
    for plan in (written.plan, planner.Planned(written.plan, written.sizes)):
        with pytest.raises(
            planner.UsageError, match=r"^--bits: expected no plan .* found --plan by router-norm-maxvar$"
        ):
            planner.quantize(MIXTRAL, plan=plan, bits=(1, 2), output=tmp_path / "out")


def test_a_plan_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(planner.UsageError, match="expected a file to write, found a folder"):
        planner.plan(MIXTRAL, output=tmp_path)


def test_a_stopped_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, heard = tmp_path / "out", list[str]()
    arguments: dict[str, Any] = {"avg_bits": 2, "method": "kl", "quantizer": "rtn", "output": out, **TEXT}
    with monkeypatch.context() as patch:
        patch.setattr("planner.api.quantizing.write_card", interrupt)
        with pytest.raises(KeyboardInterrupt) as stopped:
            planner.quantize(MIXTRAL, **arguments)
    assert stopped.value.__notes__[0].startswith(f"{out}.partial (")
    made = planner.quantize(MIXTRAL, progress=lambda event: heard.append(str(event)), **arguments)
    assert "plan: made by an earlier run" in heard
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify(made.output).experts == MIXTRAL_SIZES.all_experts


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt
