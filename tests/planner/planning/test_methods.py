"""Every allocation method, from the command: one statistics file for all that read a text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from planner.calibration.measures import MEASURES
from planner.calibration.reading.text import calibration_text
from planner.plan_file import read_plan
from planner.planning.methods import METHODS
from tests.conftest import Outcome, one_line, run_here
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.shipped import MIXTRAL_PREFIXES, MIXTRAL_SIZES

pytestmark = pytest.mark.slow

READ = ("--data", CALIBRATION_TEXT, "--samples", 4, "--seq-len", 128)
CALIBRATED = [name for name, method in METHODS.items() if method.calibrated]
PLANNED = [name for name, method in METHODS.items() if not method.only_compared]
LAYERWISE = [name for name, method in METHODS.items() if method.layerwise]
PREFIXES, EXPERTS = MIXTRAL_PREFIXES, MIXTRAL_SIZES.experts
TOTAL = MIXTRAL_SIZES.all_experts
Moeq = Callable[..., Outcome]
MakePlan = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every method asks for, from 4 × 128 tokens."""
    output = tmp_path_factory.mktemp("statistics") / "all.safetensors"
    run_here("calibrate", MIXTRAL, *READ, "--for", ",".join(CALIBRATED), "-o", output)
    return output


@pytest.fixture
def make_plan(moeq: Moeq, stats: Path, tmp_path: Path) -> MakePlan:
    """Return a function that plans by a method, checks that file and output agree, and returns the plan."""

    def run(method: str, *flags: object) -> dict[str, Any]:
        known = ("--stats", stats) if METHODS[method].calibrated else ()
        path = tmp_path / "plan.json"
        found = moeq("plan", MIXTRAL, "--method", method, *known, *flags, "-o", path, "--json")
        assert found.code == 0, found.err
        plan = json.loads(found.out)
        assert read_plan(path).model_dump(mode="json") == {key: plan[key] for key in plan if key != "sizes"}
        return dict(plan)

    return run


@pytest.mark.parametrize(
    ("method", "average"),
    [(name, bits) for name in PLANNED for bits in ("1", "1.7", "2", "2.5") if name != "uniform" or "." not in bits],
)
def test_every_method_makes_a_plan(make_plan: MakePlan, method: str, average: str) -> None:
    row = METHODS[method]
    plan = make_plan(method, "--avg-bits", average)
    widths = plan["experts"]
    assert list(widths) == PREFIXES
    assert all(len(layer) == EXPERTS and set(layer) <= set(row.choices) for layer in widths.values())
    total = sum(sum(layer) for layer in widths.values())
    assert total <= float(average) * TOTAL
    assert plan["achieved_avg_bits"] == total / TOTAL
    assert (plan["method"], plan["bit_choices"]) == (method, list(row.choices))
    for prefix, order in plan["order"].items():
        assert sorted(order) == list(range(EXPERTS))
        given = [widths[prefix][expert] for expert in order]
        assert given == sorted(given, reverse=True)
    assert list(plan["order"]) == PREFIXES
    names = {"router_norm", "max_var"} & set(row.metrics) | set(row.observed)
    names |= {name for measure in row.measures for name in MEASURES[measure].all_names(row.choices)}
    if "spectrum" in row.metrics:
        names |= {f"{name}_{matrix}" for name in ("alpha", "variance", "weights") for matrix in ("gate", "up", "down")}
    for prefix in PREFIXES:
        assert set(plan["scores"][prefix]) == names
        assert all(len(values) == EXPERTS for values in plan["scores"][prefix].values())
    assert plan["cost"]["seconds"] >= 0
    assert plan["cost"]["peak_bytes"] > 0
    assert ("objective" in plan["cost"]) == (row.costs is not None)
    for name in ("calibration_seconds", "calibration_peak_bytes"):
        assert (plan["cost"].get(name, 0.0) > 0) == row.calibrated
    if row.layerwise:
        assert all(len(set(layer)) == 1 for layer in widths.values())
        assert total > float(average) * TOTAL - EXPERTS
    elif method != "uniform" and not row.costs:
        assert total == int(float(average) * TOTAL)


@pytest.mark.parametrize("method", [name for name in PLANNED if METHODS[name].costs and not METHODS[name].layerwise])
def test_more_bits_never_cost_more(make_plan: MakePlan, method: str) -> None:
    objectives = [make_plan(method, "--avg-bits", average)["cost"]["objective"] for average in (1.5, 2, 2.5)]
    assert objectives[0] >= objectives[1] >= objectives[2]


@pytest.mark.parametrize(
    ("method", "quantizer", "name"),
    [
        ("kl", "hqq", "kl"),
        ("kl", "gptq", "kl_gptq"),
        ("kl-estimated", "gptq", "kl_estimated_gptq"),
        ("gemq", "gptq", "gemq"),
    ],
)
def test_one_budget_is_spent_where_it_costs_least(make_plan: MakePlan, method: str, quantizer: str, name: str) -> None:
    plan = make_plan(method, "--avg-bits", 2, "--quantizer", quantizer)
    slots = [(prefix, expert) for prefix in PREFIXES for expert in range(EXPERTS)]
    table = [
        [plan["scores"][prefix][f"{name}_{bits}"][expert] for bits in plan["bit_choices"]] for prefix, expert in slots
    ]
    least = {0: 0.0}  # bits spent -> cost, expert by expert
    for row in table:
        after: dict[int, float] = {}
        for spent, cost in least.items():
            for bits, more in zip(plan["bit_choices"], row, strict=True):
                after[spent + bits] = min(after.get(spent + bits, math.inf), cost + more)
        least = after
    best = min(cost for spent, cost in least.items() if spent <= 2 * TOTAL)
    assert plan["cost"]["objective"] == pytest.approx(best, rel=1e-9)


def test_layers_of_little_change_in_direction_get_less(make_plan: MakePlan) -> None:
    for method, metric in (("bsp", "block_score"), ("bsp-cosine", "block_cosine")):
        plan = make_plan(method, "--avg-bits", 2)
        scores = [plan["scores"][prefix][metric][0] for prefix in PREFIXES]
        assert all(len(set(plan["scores"][prefix][metric])) == 1 for prefix in PREFIXES)
        widths = [plan["experts"][prefix][0] for prefix in PREFIXES]
        ranked = sorted(range(len(PREFIXES)), key=lambda layer: scores[layer])
        assert [widths[layer] for layer in ranked] == sorted(widths, reverse=True)


@pytest.mark.parametrize("method", ["kl", "gemq", "kl-estimated", "alphaq"])
def test_methods_for_single_experts_keep_overrides(make_plan: MakePlan, tmp_path: Path, method: str) -> None:
    fixed = {f"{PREFIXES[0]}.0": 3, f"{PREFIXES[2]}.7": 3, f"{PREFIXES[1]}.6": 1}
    (tmp_path / "fixed.json").write_text(json.dumps(fixed))
    plan = make_plan(method, "--avg-bits", 1.5, "--overrides", tmp_path / "fixed.json")
    for name, bits in fixed.items():
        prefix, _, expert = name.rpartition(".")
        assert plan["experts"][prefix][int(expert)] == bits
    assert plan["achieved_avg_bits"] <= 1.5
    assert plan["settings"]["overrides"] == fixed


@pytest.mark.parametrize("method", LAYERWISE)
def test_methods_for_layers_refuse_overrides(moeq: Moeq, stats: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "fixed.json").write_text(json.dumps({f"{PREFIXES[0]}.0": 3}))
    flags = ("--method", method, "--stats", stats, "--overrides", tmp_path / "fixed.json")
    found = one_line(moeq("plan", MIXTRAL, *flags))
    assert f"--overrides: expected a method for single experts with it, found --method {method}" in found


def test_slim_is_refused_with_its_reason(moeq: Moeq) -> None:
    found = one_line(moeq("plan", MIXTRAL, "--method", "slim"))
    assert found == f"error: --method slim: {METHODS['slim'].only_compared}"
    assert "moeq compare" in found


class TestAuto:
    PAPER = "method auto: no calibration given, so router-norm-maxvar, the paper's rule"
    OURS = "method auto: calibration given, so kl;"

    @pytest.mark.parametrize("given", ["stats", "data", "nothing"])
    def test_depends_on_calibration(self, moeq: Moeq, stats: Path, given: str) -> None:
        flags: dict[str, tuple[object, ...]] = {"stats": ("--stats", stats), "data": READ, "nothing": ()}
        found = moeq("plan", MIXTRAL, *flags[given], "--avg-bits", 2, "--json")
        assert found.code == 0, found.err
        said = [line for line in found.err.splitlines() if line.startswith("method auto:")]
        assert len(said) == 1
        assert said[0].startswith(self.PAPER if given == "nothing" else self.OURS)
        assert json.loads(found.out)["method"] == ("router-norm-maxvar" if given == "nothing" else "kl")

    def test_is_silent_about_a_method_that_was_named(self, moeq: Moeq) -> None:
        assert "method auto" not in moeq("plan", MIXTRAL, "--method", "max-var").err


class TestData:
    @pytest.mark.parametrize(("method", "quantizer"), [("kl", "hqq"), ("kl", "gptq"), ("pmq", "gptq")])
    def test_the_plan_is_that_of_statistics_made_before(
        self, moeq: Moeq, tmp_path: Path, method: str, quantizer: str
    ) -> None:
        flags, path = ("--avg-bits", 2, "--quantizer", quantizer), tmp_path / "s.safetensors"
        assert moeq("calibrate", MIXTRAL, *READ, "--for", method, "--seed", 3, "-o", path).code == 0
        two_steps = moeq("plan", MIXTRAL, "--method", method, "--stats", path, *flags, "--json")
        at_once = moeq("plan", MIXTRAL, "--method", method, *READ, "--seed", 3, *flags, "--json")
        assert at_once.code == 0, at_once.err
        one, two = (json.loads(found.out) for found in (at_once, two_steps))
        for key in ("experts", "order", "scores", "achieved_avg_bits"):
            assert one[key] == two[key]
        assert two["settings"]["stats"] == str(path)
        assert one["settings"]["stats"] is None
        assert one["cost"]["calibration_seconds"] > 0

    def test_a_text_for_a_method_that_reads_none_is_refused(self, moeq: Moeq) -> None:
        found = one_line(moeq("plan", MIXTRAL, "--method", "max-var", *READ))
        assert "--data: expected a method or a quantizer that reads a text with it, found --method max-var" in found


@pytest.mark.parametrize("methods", ["unknown", "kl,unknown", "max-var", "slim", "kl,"])
def test_calibrating_for_methods_that_read_no_text_is_refused(moeq: Moeq, tmp_path: Path, methods: str) -> None:
    found = one_line(moeq("calibrate", MIXTRAL, *READ, "--for", methods, "-o", tmp_path / "s.safetensors"))
    assert "--for: expected methods that use a text (kl, " in found
    assert repr(methods.split(",")[-1]) in found
    assert not list(tmp_path.iterdir())


def test_statistics_of_other_widths_are_refused(moeq: Moeq, stats: Path) -> None:
    found = one_line(moeq("plan", MIXTRAL, "--method", "gemq", "--stats", stats, "--bits", "2,8"))
    assert "found no gemq_8; make them with moeq calibrate --for gemq --bits 2,8" in found


def test_counts_are_those_of_the_routers_of_transformers(stats: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MIXTRAL, dtype=torch.float32)
    logits: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda _router, _inputs, output, index=index: logits.update({index: output[0]})
        )
    with torch.inference_mode():
        model(input_ids=calibration_text(MIXTRAL, str(CALIBRATION_TEXT), 4, 128, 0).tokens)
    found = load_file(stats)
    for index, prefix in enumerate(PREFIXES):
        probabilities, experts = logits[index].softmax(dim=-1).topk(MIXTRAL_SIZES.chosen)
        tokens = torch.bincount(experts.flatten(), minlength=EXPERTS)
        weight = torch.zeros(EXPERTS).index_add_(0, experts.flatten(), probabilities.flatten())
        assert torch.equal(found[f"{prefix}.tokens"], tokens)
        assert torch.allclose(found[f"{prefix}.gate_probability"], weight, rtol=1e-4, atol=1e-5)
