"""``--linear-bits auto``, from a text or statistics to a checkpoint, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import planner
from planner.model.layout import read_layout
from planner.model.quantized import DequantizedModel
from planner.model.source import SourceModel
from tests.architectures import build
from tests.conftest import Outcome, one_line, run_here
from tests.paths import CALIBRATION_TEXT, MIXTRAL
from tests.shipped import MIXTRAL_SIZES
from vllm_moeq.format import load_config, verify

pytestmark = pytest.mark.slow

Run = Callable[..., Outcome]
TEXT = ("--data", CALIBRATION_TEXT, "--samples", 4, "--seq-len", 64)
AUTO = ("--linear-bits", "auto")
GROUPS = 2 * MIXTRAL_SIZES.layers
"""What has one width: query, key and value of a layer, and its output."""


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "s.safetensors"
    run_here("calibrate", MIXTRAL, *TEXT, "-o", path)
    return path


@pytest.fixture(scope="module")
def average(stats: Path) -> float:
    """The least average at which some linears, and not all, have eight bits. It depends on the model."""
    for eighths in range(16, 33):
        made = planner.plan(MIXTRAL, stats=stats, quantizer="gptq", avg_bits=eighths / 8, linear_bits="auto").plan
        if set(made.linears.values()) >= {4, 8}:
            return eighths / 8
    raise AssertionError("no average has both widths")


@pytest.fixture(scope="module")
def plan(stats: Path) -> Path:
    path = stats.with_name("plan.json")
    run_here("plan", MIXTRAL, "--stats", stats, "--quantizer", "gptq", "--avg-bits", 2, *AUTO, "-o", path)
    return path


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def size_of(moeq: Run, *flags: object) -> int:
    found = moeq("plan", MIXTRAL, *flags, "--json")
    assert found.code == 0, found.err
    return int(json.loads(found.out)["sizes"]["total_bytes"])


def test_a_text_becomes_a_checkpoint_with_both_widths(moeq: Run, average: float, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = moeq("quantize", MIXTRAL, *TEXT, "--avg-bits", average, *AUTO, "-o", output)
    assert made.code == 0, made.err
    assert "linears outside the experts: " in made.out
    linears = content(output / "plan.json")["linears"]
    config = load_config(output)
    assert {name: config.linear.bits_of(name) for name in linears if name not in config.unquantized} == {
        name: bits for name, bits in linears.items() if bits != 16
    }
    assert set(linears.values()) >= {4, 8}
    assert config.format_version == 2
    verify(output)
    assert "--linear-bits auto" in (output / "README.md").read_text()
    flags = ("--method", "router-norm", "--bits", "1,2,3,4", "--avg-bits", average)
    assert json.loads(moeq("report", output, "--json").out)["total_bytes"] <= size_of(moeq, *flags)


def test_statistics_need_no_text(moeq: Run, stats: Path, average: float) -> None:
    with safe_open(str(stats), framework="pt") as handle:
        names = {name for name in handle.keys() if name.startswith("linears.")}  # noqa: SIM118 (not a mapping)
        assert names == {f"linears.{name}_{bits}" for name in ("kl", "kl_gptq") for bits in (4, 8)}
        assert all(handle.get_tensor(name).shape == (GROUPS,) for name in names)
    gptq = ("--stats", stats, "--avg-bits", average, "--quantizer", "gptq")
    found = moeq("plan", MIXTRAL, *gptq, *AUTO)
    assert found.code == 0, found.err
    assert "linears outside the experts: " in found.out
    assert size_of(moeq, "--stats", stats, *AUTO) <= size_of(moeq, "--stats", stats)
    objective = []
    for flags in ((), AUTO):
        made = moeq("plan", MIXTRAL, *gptq, *flags, "--json")
        objective.append(json.loads(made.out))
    assert "linears" not in objective[0]
    assert objective[1]["achieved_avg_bits"] < objective[0]["achieved_avg_bits"]


def test_quantize_obeys_the_plan(moeq: Run, plan: Path, tmp_path: Path) -> None:
    changed, output = content(plan), tmp_path / "out"
    kept = "model.layers.1.self_attn.o_proj"
    changed["linears"][kept] = 16
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed))
    made = moeq("quantize", MIXTRAL, "--plan", path, "--quantizer", "rtn", "-o", output)
    assert made.code == 0, made.err
    assert kept in load_config(output).unquantized
    assert content(output / "plan.json")["linears"] == changed["linears"]
    assert verify(output).linears.keys() <= {4, 8}
    with DequantizedModel(output) as model:
        exact = load_file(MIXTRAL / "model.safetensors")
        assert bool((model.shards.load(f"{kept}.weight") == exact[f"{kept}.weight"]).all())


def test_a_dry_run_expects_no_more_than_four_bits(moeq: Run, tmp_path: Path) -> None:
    sizes = []
    for flags in ((), AUTO):
        found = moeq("quantize", MIXTRAL, *TEXT, *flags, "--dry-run", "--json", "-o", tmp_path / "out")
        assert found.code == 0, found.err
        sizes.append(json.loads(found.out)["sizes"])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("method", ["kl", "kl-estimated"])
def test_dense_layers_shared_experts_and_joined_attention(method: str, tmp_path: Path) -> None:
    folder = tmp_path / "deepseek"
    build("deepseek_v3", folder)
    made = planner.plan(
        folder, method=method, linear_bits="auto", data=str(CALIBRATION_TEXT), samples=2, seq_len=32
    ).plan
    with SourceModel(folder) as model:
        made.check_against(read_layout(model), "x")
    assert len(set(made.linears.values())) > 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (AUTO, "--linear-bits auto: expected --method kl or kl-estimated"),
        ((*AUTO, "--method", "pmq", *TEXT), "found pmq"),
        ((*AUTO, "--ranking", "layer", *TEXT), "expected --ranking global"),
        (("--linear-bits", "5"), "--linear-bits: expected 4, 8 or 16, the widths that vLLM's kernels serve, or auto"),
        (("--linear-bits", "16", "--linear-group-size", 32), "--linear-group-size: expected --linear-bits 4 or 8"),
    ],
)
def test_what_plan_cannot_do_is_refused(moeq: Run, flags: tuple[object, ...], reason: str) -> None:
    assert reason in one_line(moeq("plan", MIXTRAL, "--avg-bits", 2, *flags))


def test_a_plan_and_a_flag_that_disagree_are_refused(moeq: Run, plan: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    assert moeq("plan", MIXTRAL, "--avg-bits", 2, "-o", plain).code == 0
    output = ("--quantizer", "rtn", "-o", tmp_path / "out")
    beside = moeq("quantize", MIXTRAL, "--plan", plan, "--linear-bits", 8, *output)
    assert f"--linear-bits: expected auto or none, as {plan} gives linears their widths, found 8" in one_line(beside)
    without = moeq("quantize", MIXTRAL, "--plan", plain, *AUTO, *output)
    assert f"found none in {plain}" in one_line(without)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [(), ("--linear-bits", "8")], ids=str)
def test_a_plan_keeps_the_width_that_was_asked_for_all(flags: tuple[str, ...], moeq: Run, tmp_path: Path) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "out"
    assert moeq("plan", MIXTRAL, "--avg-bits", 2, "--linear-bits", 8, "-o", plan).code == 0
    assert moeq("quantize", MIXTRAL, "--plan", plan, *flags, "--quantizer", "rtn", "-o", output).code == 0
    config = load_config(output)
    assert (config.format_version, config.linear.bits, config.linear.widths) == (1, 8, {})
    other = moeq(
        "quantize", MIXTRAL, "--plan", plan, "--linear-bits", 4, "--quantizer", "rtn", "-o", tmp_path / "other"
    )
    assert f"--linear-bits: expected auto or none, as {plan} gives linears their widths, found 4" in one_line(other)


def test_a_comparison_has_one_width(moeq: Run, tmp_path: Path) -> None:
    flags = ("--methods", "kl", *TEXT, "--held-out", MIXTRAL / "held_out.txt", "-o", tmp_path / "out")
    assert "--linear-bits auto: expected 4, 8 or 16" in one_line(moeq("compare", MIXTRAL, *flags, *AUTO))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda it: it.pop("linears.kl_8"), "expected kl_4, kl_8, kl_gptq_4, kl_gptq_8 of linears"),
        (lambda it: it.update({"linears.kl_8": it["linears.kl_8"][1:].clone()}), f"linears.kl_8: expected [{GROUPS}]"),
        (lambda it: it["linears.kl_4"].fill_(float("nan")), "tensor linears.kl_4: expected finite values"),
    ],
)
def test_other_statistics_are_refused(
    moeq: Run, stats: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    tensors, path = load_file(stats), tmp_path / "s.safetensors"
    change(tensors)
    save_file(tensors, path)
    path.with_suffix(".json").write_text(stats.with_suffix(".json").read_text())
    assert reason in one_line(moeq("plan", MIXTRAL, "--stats", path, *AUTO))
    assert moeq("plan", MIXTRAL, "--stats", path).code == 0  # a plan without widths of linears does not read them
