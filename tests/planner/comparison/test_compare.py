"""``moeq compare``: its numbers against transformers on exported checkpoints, its files, killed runs, mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Outcome, one_line, run_here
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.shipped import MIXTRAL_SIZES
from tests.tiers import thorough

pytestmark = pytest.mark.slow

HELD_OUT = MIXTRAL / "held_out.txt"
TOKENS = 2048
READ = ("--data", CALIBRATION_TEXT, "--samples", 4, "--seq-len", 128)
EVALUATE = ("--held-out", HELD_OUT, "--max-tokens", TOKENS)
SCORES = ("perplexity", "perplexity_error", "kl", "kl_error", "kl_median", "kl_99", "kl_max", "same_top", "tokens")
Moeq = Callable[..., Outcome]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five methods at two bits, two seeds, with and without ODP; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    methods = "kl,router-norm-maxvar,uniform,random,slim"
    run_here(
        "compare", MIXTRAL, "--methods", methods, "--avg-bits", 2, "--seeds", 2, "--odp", 0.5, *READ, *EVALUATE,
        "-o", folder,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def rows(output: Path) -> list[Row]:
    return list(json.loads((output / "compare.json").read_text()))


def one(rows: list[Row], method: str, seed: int = 0, odp: float = 0.0) -> Row:
    found = [row for row in rows if (row["method"], row.get("seed"), row.get("odp")) == (method, seed, odp)]
    assert len(found) == 1
    return found[0]


def scores_of(row: Row) -> list[float]:
    return [row[name] for name in SCORES]


def predictions(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities [tokens, vocabulary] of the text in windows of 512, and its tokens but the first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = HELD_OUT.read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(MIXTRAL)(text)["input_ids"][:TOKENS])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        parts = [model(input_ids=part[None]).logits[0] for part in ids[:-1].split(512)]
    return torch.cat(parts).double().log_softmax(dim=-1), ids[1:]


def quantized(moeq: Moeq, plan: Path, folder: Path, *flags: object) -> Path:
    found = moeq("quantize", MIXTRAL, "--plan", plan, *flags, "-o", folder)
    assert found.code == 0, found.err
    return folder


def test_files(output: Path, rows: list[Row]) -> None:
    assert sorted(path.name for path in output.iterdir()) == [
        "compare.csv", "compare.json", "compare.md", "compare.png",
    ]  # fmt: skip
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    with (output / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["method"] == row["method"]
        assert [float(line[name]) for name in SCORES] == scores_of(row)
    markdown = (output / "compare.md").read_text()
    assert "2,047 held-out tokens, windows of 512" in markdown
    for method in ("kl", "router-norm-maxvar", "uniform", "random", "slim", "kl, ODP 0.5"):
        assert f"| {method} | " in markdown
    assert "## 99th percentile of the KL divergence over tokens, nats" in markdown


def test_rows(rows: list[Row]) -> None:
    original, rest = rows[0], rows[1:]
    assert (original["method"], original["kl"], original["same_top"], original["tokens"]) == ("original", 0, 1, 2047)
    expected = {"kl": 2, "router-norm-maxvar": 1, "uniform": 1, "random": 2, "slim": 2}
    for odp in (0.0, 0.5):
        for method, seeds in expected.items():
            assert [row["seed"] for row in rest if (row["method"], row["odp"]) == (method, odp)] == list(range(seeds))
    assert len(rest) == 2 * sum(expected.values())
    for row in rest:
        assert row["achieved"] <= row["average"] == 2
        assert 0 < row["kl_median"] < row["kl"] < row["kl_99"] < row["kl_max"]
        assert row["perplexity"] > original["perplexity"]
        assert 0 < row["bytes"] < original["bytes"]
        assert (row["fallbacks"] is None) == (row["method"] != "slim")  # hqq calibrates nothing
        assert set(row["cost"]) == (set() if row["method"] == "slim" else {"seconds", "bytes", "forward_passes"})
    assert one(rows, "kl")["cost"]["forward_passes"] == 1
    assert one(rows, "random", 0)["model"] != one(rows, "random", 1)["model"]
    assert one(rows, "slim", 0)["perplexity"] != one(rows, "slim", 1)["perplexity"]


def test_odp_changes_the_scores(rows: list[Row]) -> None:
    for method in ("kl", "router-norm-maxvar", "uniform", "random", "slim"):
        whole, pruned = one(rows, method), one(rows, method, odp=0.5)
        assert whole["kl"] != pruned["kl"]
        assert whole["bytes"] == pruned["bytes"]
    assert one(rows, "kl")["kl"] < one(rows, "kl", odp=0.5)["kl"]


@pytest.fixture(scope="module")
def original() -> tuple[torch.Tensor, torch.Tensor]:
    return predictions(MIXTRAL)


def test_the_original_is_that_of_transformers(original: tuple[torch.Tensor, torch.Tensor], rows: list[Row]) -> None:
    likely, targets = original
    loss = -likely.gather(1, targets[:, None])
    assert rows[0]["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-5)


@pytest.mark.parametrize("method", ["kl", "router-norm-maxvar"])
def test_scores_are_those_of_the_exported_checkpoint(
    moeq: Moeq, tmp_path: Path, original: tuple[torch.Tensor, torch.Tensor], rows: list[Row], method: str
) -> None:
    plan, dense = tmp_path / "plan.json", tmp_path / "dense"
    text = (*READ, "--quantizer", "hqq") if method == "kl" else ()
    assert moeq("plan", MIXTRAL, "--method", method, "--avg-bits", 2, *text, "-o", plan).code == 0
    folder = quantized(moeq, plan, tmp_path / "quantized", "--quantizer", "hqq")
    assert moeq("export", folder, "-o", dense).code == 0
    (exact, targets), (likely, _) = original, predictions(dense)
    divergence = (exact.exp() * (exact - likely)).sum(dim=1)
    row = one(rows, method)
    loss = -likely.gather(1, targets[:, None])
    assert row["perplexity"] == pytest.approx(float(loss.mean().exp()), rel=1e-3)
    assert row["kl"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert row["kl_99"] == pytest.approx(float(np.quantile(divergence, 0.99)), rel=2e-2)
    assert row["kl_median"] == pytest.approx(float(divergence.median()), rel=2e-2)
    same = (exact.argmax(dim=1) == likely.argmax(dim=1)).double().mean()
    assert row["same_top"] == pytest.approx(float(same), abs=3e-3)
    assert row["achieved"] == json.loads(plan.read_text())["achieved_avg_bits"]


def test_uniform_is_what_eval_says(moeq: Moeq, tmp_path: Path, rows: list[Row]) -> None:
    flags = ("--method", "uniform", "--avg-bits", 2, "-o", tmp_path / "plan.json")
    assert moeq("plan", MIXTRAL, *flags).code == 0
    folder = quantized(moeq, tmp_path / "plan.json", tmp_path / "quantized")
    found = moeq("eval", folder, "--data", HELD_OUT, "--max-tokens", TOKENS, "--json")
    assert one(rows, "uniform")["perplexity"] == pytest.approx(json.loads(found.out)["perplexity"], rel=1e-3)


def test_equal_widths_give_equal_scores(moeq: Moeq, tmp_path: Path, rows: list[Row]) -> None:
    """With one width to choose from, random orders are uniform; and other candidates beside it do not matter."""
    flags = ("--methods", "random,uniform", "--bits", "2", "--avg-bits", 2, "--seeds", 2, *EVALUATE)
    found = moeq("compare", MIXTRAL, *flags, "-o", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    printed = json.loads(found.out)
    assert printed == json.loads((tmp_path / "out" / "compare.json").read_text())
    uniform = one(printed, "uniform")
    for seed in range(2):
        assert scores_of(one(printed, "random", seed)) == scores_of(uniform)
    assert scores_of(uniform) == pytest.approx(scores_of(one(rows, "uniform")), rel=1e-3)


def test_gptq(moeq: Moeq, tmp_path: Path, rows: list[Row]) -> None:
    gptq = ("--quantizer", "gptq", "--min-tokens", 128, *READ)  # more tokens than some experts get
    flags = ("--methods", "uniform,router-norm", "--avg-bits", 2, *gptq, *EVALUATE)
    found = moeq("compare", MIXTRAL, *flags, "--jobs", 2, "-o", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    row = one(json.loads(found.out), "uniform")
    assert row["kl"] < one(rows, "uniform")["kl"]
    plan = tmp_path / "plan.json"
    assert moeq("plan", MIXTRAL, "--method", "uniform", "--avg-bits", 2, "-o", plan).code == 0
    folder = quantized(moeq, plan, tmp_path / "quantized", *gptq)
    value = json.loads(moeq("eval", folder, "--data", HELD_OUT, "--max-tokens", TOKENS, "--json").out)["perplexity"]
    assert row["perplexity"] == pytest.approx(value, rel=1e-3)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert row["fallbacks"] == sum(map(len, config["plan"]["fallback"].values())) > 0
    assert "## Experts that fell back from calibration" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize("quantizer", thorough(["hqq", "gptq"], ["hqq"]))
def test_schemes_side_by_side(moeq: Moeq, tmp_path: Path, quantizer: str) -> None:
    text = READ if quantizer == "gptq" else ()
    flags = ("--methods", "uniform", "--avg-bits", 2, "--scheme", "grid,trellis", "--quantizer", quantizer, *text)
    found = moeq("compare", MIXTRAL, *flags, *EVALUATE, "-o", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    _, grid, trellis = json.loads(found.out)
    assert (grid["scheme"], trellis["scheme"]) == ("grid", "trellis")
    assert trellis["kl"] < grid["kl"]
    assert 2 < trellis["stored"] < grid["stored"] == 2.25
    markdown = (tmp_path / "out" / "compare.md").read_text()
    for line in ("| uniform | 2.250 |", f"| uniform, trellis | {trellis['stored']:.3f} |", "grid and as trellis"):
        assert line in markdown
    plan = tmp_path / "plan.json"
    assert moeq("plan", MIXTRAL, "--method", "uniform", "--avg-bits", 2, "-o", plan).code == 0
    folder = quantized(moeq, plan, tmp_path / "quantized", "--quantizer", quantizer, "--scheme", "trellis", *text)
    value = json.loads(moeq("eval", folder, "--data", HELD_OUT, "--max-tokens", TOKENS, "--json").out)["perplexity"]
    assert trellis["perplexity"] == pytest.approx(value, rel=1e-3)


class TestKilledRuns:
    FLAGS = ("--methods", "pmq,router-norm-maxvar,uniform", "--avg-bits", "2,3", *READ, "--max-tokens", 600)

    def test_results_are_kept(self, moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from planner.calibration.collect import collect
        from planner.comparison.scores import score

        calls: dict[str, int] = {"score": 0, "collect": 0}

        def counted(*arguments: Any, **options: Any) -> Any:
            calls["score"] += 1
            if calls["score"] == 4:
                raise KeyboardInterrupt
            return score(*arguments, **options)

        def collected(*arguments: Any, **options: Any) -> Any:
            calls["collect"] += 1
            return collect(*arguments, **options)

        command = ("compare", MIXTRAL, *self.FLAGS, "--held-out", HELD_OUT, "--json")
        whole = json.loads(moeq(*command, "-o", tmp_path / "whole").out)
        monkeypatch.setattr("planner.comparison.evaluate.AT_A_TIME", 1)  # one model after the other
        monkeypatch.setattr("planner.comparison.evaluate.score", counted)
        monkeypatch.setattr("planner.comparison.entries.collect", collected)
        assert moeq(*command, "-o", tmp_path / "cut").code == 130
        assert not (tmp_path / "cut").exists()
        partial = tmp_path / "cut.partial"
        assert len(list(partial.glob("result-*.json"))) == 3  # the original and two models
        refused = moeq(*command, "--window", 256, "-o", tmp_path / "cut")
        assert (refused.code, "other comparison" in refused.err) == (2, True)
        found = moeq(*command, "-o", tmp_path / "cut")
        assert found.code == 0, found.err
        models = len({row["model"] for row in whole[1:]})
        assert calls == {"score": 1 + models + 1, "collect": 1}  # the one that was interrupted again, and the rest
        resumed = json.loads(found.out)
        assert [row["method"] for row in resumed] == [row["method"] for row in whole]
        for row, expected in zip(resumed, whole, strict=True):
            assert scores_of(row) == pytest.approx(scores_of(expected), rel=1e-3)
            assert row.get("model") == expected.get("model")
        assert not partial.exists()

    def test_an_unfinished_calibration_is_kept(
        self, moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from planner.calibration.collect import observe

        calls: list[int] = []

        def breaks(*inputs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return observe(*inputs)

        monkeypatch.setattr("planner.calibration.collect.observe", breaks)
        command = ("compare", MIXTRAL, *self.FLAGS, "--methods", "frequency", "--held-out", HELD_OUT)
        cut = moeq(*command, "-o", tmp_path / "cut")
        assert cut.code == 130
        line = cut.err.splitlines()[-1]
        assert line.startswith(f"interrupted; kept: {tmp_path / 'cut.partial'} (")
        assert " and " not in line  # the calibration lies in that folder
        assert moeq(*command, "-o", tmp_path / "cut").code == 0
        assert len(calls) == MIXTRAL_SIZES.layers + 1  # the third layer again, and those behind it

    def test_starting_anew(self, moeq: Moeq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_arguments: Any) -> None:
            raise KeyboardInterrupt

        command = ("compare", MIXTRAL, "--methods", "uniform", "--avg-bits", 2, *EVALUATE, "-o", tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr("planner.comparison.evaluate.read_text", interrupted)
            assert moeq(*command).code == 130
        assert moeq(*command, "--window", 256, "--no-resume").code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "kl,nonsense"), "--methods: expected some of kl, "),
        (("--methods", "kl,uniform"), "--methods kl: expected --data TEXT to calibrate on, found none"),
        (("--methods", "uniform,slim"), "--methods slim: expected --data TEXT"),
        (("--methods", "uniform", "--quantizer", "gptq"), "--quantizer gptq: expected --data TEXT"),
        (("--methods", "uniform", "--odp", "2"), "--odp: expected numbers above 0 and up to 1"),
        (("--methods", "uniform", "--odp", "0.3,x"), "--odp: expected numbers"),
        (("--methods", "uniform", "--odp", "0"), "--odp: expected numbers"),
        (("--methods", "uniform", "--avg-bits", "2,x"), "--avg-bits: expected a number"),
        (("--methods", "max-var", "--avg-bits", "4"), "--avg-bits: expected a value between 1 and 3"),
        (("--methods", "random", "--bits", "2,5"), "--bits: expected widths among"),
        (("--methods", "uniform", "--group-size", "48"), "--group-size"),
        (
            ("--methods", "uniform", "--held-out", "none.txt"),
            "none.txt: cannot read (No such file or directory); expected a text file",
        ),
        (("--methods", "kl", "--data", "none.txt"), "--data: expected a text"),
    ],
)
def test_mistakes(moeq: Moeq, tmp_path: Path, flags: tuple[object, ...], message: str) -> None:
    found = moeq("compare", MIXTRAL, *EVALUATE, *flags, "-o", tmp_path / "out")
    assert found.code == 2, found.err
    lines = [line for line in found.err.splitlines() if not line.endswith("calibrating, seed 0")]
    assert len(lines) == 1, found.err
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_finite(moeq: Moeq, tmp_path: Path, change_tensor: Callable[..., Path]) -> None:
    folder = Path(shutil.copytree(MIXTRAL, tmp_path / "overflows"))
    change_tensor(folder, "model.norm.weight", lambda weight: weight.fill_(3e38))
    flags = ("--methods", "uniform", "--avg-bits", 2, "--held-out", HELD_OUT, "--max-tokens", 600)
    message = one_line(moeq("compare", folder, *flags, "-o", tmp_path / "out"))
    assert f"error: {folder}: its outputs on the text are not finite: expected a loss of at most 500" in message
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(moeq: Moeq, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    message = one_line(moeq("compare", MIXTRAL, "--methods", "uniform", *EVALUATE, "-o", tmp_path / "out"))
    assert f"{tmp_path / 'out'}: the output exists already" in message
    assert not list((tmp_path / "out").iterdir())


def test_an_average_that_one_width_does_not_give_is_left_out(moeq: Moeq, tmp_path: Path) -> None:
    flags = ("--methods", "uniform,max-var", "--avg-bits", "2,2.5", *EVALUATE, "-o", tmp_path / "out", "--json")
    found = moeq("compare", MIXTRAL, *flags)
    assert "uniform: not at 2.5 bits, which one width for all does not give" in found.err
    rows = [(row["method"], row["average"]) for row in json.loads(found.out)[1:]]
    assert rows == [("uniform", 2.0), ("max-var", 2.0), ("max-var", 2.5)]
