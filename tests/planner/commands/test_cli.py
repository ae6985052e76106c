from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.plan_file import read_plan
from tests.folders import save_byte_tokenizer
from vllm_moeq import __version__

LAYERS = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(2)]
COUNTS = {
    "1.75": (3, 4, 1),
    "2.0": (2, 4, 2),
    "2.125": (2, 3, 3),
    "2.25": (2, 2, 4),
    "2.375": (2, 1, 5),
    "2.5": (2, 0, 6),
    "2.625": (1, 1, 6),
    "2.75": (1, 0, 7),
}
"""Average → experts of 1, 2, 3 bits per layer of eight."""

Moeq = Callable[..., Any]
Change = Callable[..., Any]


@pytest.fixture(scope="module")
def speaking_mixtral(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral with a tokenizer of one token per byte."""
    folder = Path(shutil.copytree(tiny_mixtral, tmp_path_factory.mktemp("speaking") / "model"))
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 20)
    return path


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_json_has_no_numbers_that_are_none(
    moeq: Moeq, mixtral_copy: Path, change_tensor: Change, weight: float
) -> None:
    change_tensor(mixtral_copy, "model.layers.1.block_sparse_moe.gate.weight", lambda gate: gate.fill_(weight))

    def refuse(word: str) -> None:
        raise ValueError(word)

    found = json.loads(moeq("inspect", mixtral_copy, "--json").out, parse_constant=refuse)
    assert found["layers"][1]["router_norm"] == [None] * 8
    assert all(norm > 0 for norm in found["layers"][0]["router_norm"])


@pytest.mark.parametrize(("average", "counts"), COUNTS.items())
def test_plan_gives_every_layer_the_published_counts(
    moeq: Moeq, tiny_mixtral: Path, tmp_path: Path, average: str, counts: tuple[int, ...]
) -> None:
    path = tmp_path / "plan.json"
    assert moeq("plan", tiny_mixtral, "--avg-bits", average, "--bits", "1,2,3", "-o", path).code == 0
    experts = read_plan(path).experts
    found = {prefix: tuple(map(widths.count, (1, 2, 3))) for prefix, widths in experts.items()}
    assert found == dict.fromkeys(LAYERS, counts)


def test_plan_with_the_counts_of_the_authors_code(moeq: Moeq, tiny_mixtral: Path) -> None:
    made = json.loads(moeq("plan", tiny_mixtral, "--avg-bits", 1.75, "--counts", "official", "--json").out)
    assert [tuple(map(made["experts"][prefix].count, (1, 2, 3))) for prefix in LAYERS] == [(4, 2, 2)] * 2


def test_plan_of_a_qwen3_moe(moeq: Moeq, tiny_qwen3_moe: Path) -> None:
    made = json.loads(moeq("plan", tiny_qwen3_moe, "--avg-bits", 2.5, "--bits", "1,4", "--json").out)
    assert {prefix: sorted(widths) for prefix, widths in made["experts"].items()} == {
        f"model.layers.{layer}.mlp.experts": [1, 1, 4, 4] for layer in range(2)
    }


def test_plan_within_a_budget(moeq: Moeq, tiny_mixtral: Path) -> None:
    made = json.loads(moeq("plan", tiny_mixtral, "--budget-gib", "0.0002", "--group-size", 64, "--json").out)
    assert made["sizes"]["total_bytes"] <= 0.0002 * 2**30
    assert made["settings"]["budget_gib"] == 0.0002


def test_plan_with_overrides(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps({f"{LAYERS[1]}.4": 1, f"{LAYERS[1]}.5": 3}))
    made = json.loads(moeq("plan", tiny_mixtral, "--avg-bits", 2, "--overrides", path, "--json").out)
    assert made["experts"][LAYERS[1]][4:6] == [1, 3]


def test_plan_says_what_auto_means(moeq: Moeq, tiny_mixtral: Path) -> None:
    assert "method auto: no calibration given, so router-norm-maxvar" in moeq("plan", tiny_mixtral).err


def test_plan_for_people_names_the_average(moeq: Moeq, tiny_mixtral: Path) -> None:
    assert "average 2.2500 bits of 2.25 requested" in moeq("plan", tiny_mixtral, "--avg-bits", 2.25).out


@pytest.mark.parametrize(("method", "promotes"), [("router-norm-maxvar", True), ("random", False)])
def test_plan_for_people_tells_promotions_where_there_are_some(
    moeq: Moeq, tiny_mixtral: Path, method: str, promotes: bool
) -> None:
    assert ("MaxVar promoted" in moeq("plan", tiny_mixtral, "--method", method).out) == promotes


def test_inspect_describes_the_model(moeq: Moeq, tiny_mixtral: Path) -> None:
    facts = json.loads(moeq("inspect", tiny_mixtral, "--json").out)
    assert (facts["model_type"], facts["dtypes"], facts["linears"]) == ("mixtral", ["bfloat16"], 8)
    assert facts["expert_parameters"] == 2 * 8 * 3 * 64 * 128
    assert [len(layer["router_norm"]) for layer in facts["layers"]] == [8, 8]


def test_inspect_for_people_lists_every_layer(moeq: Moeq, tiny_mixtral: Path) -> None:
    lines = moeq("inspect", tiny_mixtral).out.splitlines()
    assert [line.split()[1:4:2] for line in lines if line.startswith("│")] == [["0", "8"], ["1", "8"]]


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_quantize_then_verify(moeq: Moeq, tmp_path: Path, model: str, request: pytest.FixtureRequest) -> None:
    source, output = request.getfixturevalue(model), tmp_path / "out"
    made = json.loads(moeq("quantize", source, "-o", output, "--avg-bits", 2, "--group-size", 64, "--json").out)
    checked = json.loads(moeq("verify", output, "--json").out)
    assert checked["average_bits"] == made["achieved_avg_bits"] == 2
    assert checked["total_bytes"] == made["sizes"]["total_bytes"]


def test_quantize_follows_a_plan(moeq: Moeq, tiny_mixtral: Path, all_widths_plan: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert moeq("quantize", tiny_mixtral, "--plan", all_widths_plan, "-o", output, "--group-size", -1).code == 0
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["experts"] == read_plan(all_widths_plan).experts


def test_dry_run_writes_nothing(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    outcome = moeq("quantize", tiny_mixtral, "-o", tmp_path / "out", "--group-size", 32, "--dry-run", "--json")
    assert (outcome.code, list(tmp_path.iterdir())) == (0, [])
    assert json.loads(outcome.out)["sizes"]["total_bytes"] > 0


def test_dry_run_and_run_agree_on_the_size(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_mixtral, "-o", tmp_path / "out", "--group-size", 32, "--json")
    dry = json.loads(moeq(*arguments, "--dry-run").out)
    assert dry["sizes"] == json.loads(moeq(*arguments).out)["sizes"]


def test_verify_for_people_says_valid(moeq: Moeq, quantized_mixtral: Path) -> None:
    outcome = moeq("verify", quantized_mixtral)
    assert outcome.code == 0
    assert f"{quantized_mixtral}: valid; 2 MoE layers, 16 experts" in outcome.out


def test_export_writes_a_model(moeq: Moeq, quantized_mixtral: Path, tmp_path: Path) -> None:
    assert moeq("export", quantized_mixtral, "-o", tmp_path / "dense").code == 0
    assert json.loads(moeq("inspect", tmp_path / "dense", "--json").out)["dtypes"] == ["bfloat16"]


def test_eval_is_the_loss_of_transformers(moeq: Moeq, speaking_mixtral: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(speaking_mixtral)(text.read_text(), return_tensors="pt")["input_ids"][:, :51]
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(speaking_mixtral, dtype=torch.float32)
        expected = math.exp(model(input_ids=ids, labels=ids).loss)
    result = json.loads(moeq("eval", speaking_mixtral, "--data", text, "--max-tokens", 51, "--json").out)
    assert result["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_eval_windows_predict_every_token_once(moeq: Moeq, speaking_mixtral: Path, text: Path) -> None:
    """A window of the whole text and windows of half of it differ only by their context."""
    arguments = ("eval", speaking_mixtral, "--data", text, "--max-tokens", 61, "--json")
    whole, halves = (json.loads(moeq(*arguments, "--window", w).out)["perplexity"] for w in (60, 30))
    assert whole != halves
    assert halves == pytest.approx(whole, rel=0.2)


def test_eval_measures_the_dequantized_values(moeq: Moeq, speaking_mixtral: Path, text: Path, tmp_path: Path) -> None:
    quantized, dense = tmp_path / "quantized", tmp_path / "dense"
    moeq("quantize", speaking_mixtral, "-o", quantized, "--bits", 1, "--avg-bits", 1, "--group-size", 64)
    moeq("export", quantized, "-o", dense, "--format", "f32")
    original, packed, exported = (
        json.loads(moeq("eval", folder, "--data", text, "--json").out)["perplexity"]
        for folder in (speaking_mixtral, quantized, dense)
    )
    assert packed == pytest.approx(exported, rel=1e-5) != pytest.approx(original, rel=1e-3)
    assert math.isfinite(packed)


def test_the_installed_command_makes_a_checkpoint(moeq_process: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    outcome = moeq_process("quantize", tiny_mixtral, "-o", tmp_path / "out", "--group-size", 64, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["output"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    "command", [(), ("plan",), ("quantize",), ("verify",), ("inspect",), ("export",), ("import",), ("eval",)]
)
def test_help_stands_alone(moeq: Moeq, command: tuple[str, ...]) -> None:
    outcome = moeq(*command, "--help")
    assert outcome.code == 0
    assert "Usage: moeq" in outcome.out


def test_the_version(moeq: Moeq) -> None:
    """``tests/supply/test_build.py`` compares it with an installation's."""
    outcome = moeq("--version")
    assert (outcome.code, outcome.out) == (0, f"{__version__}\n")


def test_a_router_of_another_layer_decides_nothing(
    moeq: Moeq, tiny_mixtral: Path, mixtral_copy: Path, change_tensor: Change
) -> None:
    change_tensor(mixtral_copy, "model.layers.0.block_sparse_moe.gate.weight", lambda gate: torch.flip(gate, [0]))
    before, after = (json.loads(moeq("plan", folder, "--json").out) for folder in (tiny_mixtral, mixtral_copy))
    assert before["experts"][LAYERS[1]] == after["experts"][LAYERS[1]]
    assert before["scores"][LAYERS[0]]["router_norm"] == after["scores"][LAYERS[0]]["router_norm"][::-1]


@pytest.mark.slow
def test_a_command_to_copy_is_quoted_for_the_shell(moeq: Moeq, tiny_mixtral: Path, tmp_path: Path) -> None:
    output = tmp_path / """it's a; `b` $(c) "&" > [bold]d*"""
    found = moeq("quantize", tiny_mixtral, "--avg-bits", 2, "--quantizer", "rtn", "--group-size", 32, "-o", output)
    assert found.code == 0, found.err
    command = found.out.rpartition("serve it with: ")[2]
    assert shlex.split(command) == ["moeq", "serve", str(output), "--tokenizer", "NAME"]
    words = subprocess.run(["sh", "-c", f"printf '%s|' {command}"], capture_output=True, text=True, check=True).stdout
    assert words == f"moeq|serve|{output}|--tokenizer|NAME|"
