"""GPTQ checkpoints that others wrote, or damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.common.progress import Progress
from planner.exchange.autogptq import export_gptq, import_gptq
from planner.exchange.autogptq.layout import encode
from planner.model.source import SourceModel
from tests.conftest import one_line
from vllm_moeq.format import ShardSet, load_config, pack, read_json, verify

EXPERT = "model.layers.0.mlp.experts.1.gate_proj"  # 3 bits, [128, 64] in groups of 32
OURS = "model.layers.0.block_sparse_moe.experts.1.w1"
QUERY = "model.layers.0.self_attn.q_proj"
QUIET = Progress(quiet=True)

Moeq = Callable[..., Any]
Change = Callable[..., Any]
Refused = Callable[[Path], str]
Edit = Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | None

DAMAGED: dict[str, tuple[str, Edit, str]] = {
    "no scales": ("scales", None, "is missing"),
    "no zeros": ("qzeros", None, "is missing"),
    "no index": ("g_idx", None, "is missing"),
    "no codes": ("qweight", None, f"expected a tensor {EXPERT}.qweight beside it, found none"),
    "long codes": ("qweight", torch.Tensor.long, "a 2-D int32 tensor, found torch.int64 [6, 128]"),
    "flat codes": ("qweight", torch.flatten, "a 2-D int32 tensor, found torch.int32 [768]"),
    "five bits": (
        "qweight",
        torch.zeros(10, 128, dtype=torch.int32),
        "2, 3, 4 or 8 bits for 64 inputs, found 10 (5 bits)",
    ),
    "half a bit": ("qweight", torch.zeros(7, 128, dtype=torch.int32), "found 7 (3.5 bits)"),
    "no rows": ("qweight", torch.zeros(0, 128, dtype=torch.int32), "expected no empty tensor, found [0, 128]"),
    "odd outputs": ("qweight", torch.zeros(6, 100, dtype=torch.int32), "a multiple of 32 outputs, found 100"),
    "float32 scales": ("scales", torch.Tensor.float, "float16 [groups, 128], found torch.float32"),
    "narrow scales": ("scales", torch.ones(2, 64).half(), "float16 [groups, 128], found torch.float16 [2, 64]"),
    "no groups": ("scales", torch.ones(0, 128).half(), "expected no empty tensor, found [0, 128]"),
    "three groups": ("scales", torch.ones(3, 128).half(), "groups of equal size of 64 inputs, found 3 groups"),
    "long zeros": ("qzeros", torch.Tensor.long, "int32 [2, 12], found torch.int64 [2, 12]"),
    "wide zeros": ("qzeros", torch.zeros(2, 16, dtype=torch.int32), "int32 [2, 12], found torch.int32 [2, 16]"),
    "act order": ("g_idx", lambda index: index.flip(0), "input k in group k // 32, found another order"),
    "negative index": ("g_idx", torch.full((64,), -1, dtype=torch.int32), "input k in group k // 32"),
    "long index": ("g_idx", torch.Tensor.long, "a 1-D int32 tensor, found torch.int64 [64]"),
    "empty index": ("g_idx", torch.zeros(0, dtype=torch.int32), "expected no empty tensor, found [0]"),
    "odd inputs": ("g_idx", torch.zeros(63, dtype=torch.int32), "a multiple of 32 inputs, found 63"),
    "infinite scales": ("scales", lambda scales: scales.fill_(float("inf")), "finite scales that are not 0"),
    "scales of 0": ("scales", torch.zeros_like, "finite scales that are not 0"),
}


@pytest.fixture
def refused(moeq: Moeq, tmp_path: Path) -> Refused:
    """Return a function that imports a wrong checkpoint and returns the error."""
    return lambda folder: one_line(moeq("import", folder, "-o", tmp_path / "out"))


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tensor_is_named_and_nothing_written(
    refused: Refused, gptq_copy: Path, change_tensor: Change, tmp_path: Path, case: str
) -> None:
    suffix, edit, message = DAMAGED[case]
    change_tensor(gptq_copy, f"{EXPERT}.{suffix}", edit)
    found = refused(gptq_copy)
    assert f"{EXPERT}." in found
    assert message in found
    assert [path.name for path in tmp_path.iterdir()] == [gptq_copy.name]


CONFIGS: dict[str, tuple[Any, str]] = {
    "unknown format": ({"checkpoint_format": "gptq_p"}, "expected gptq or gptq_v2, found 'gptq_p'"),
    "no text": ({"checkpoint_format": ["gptq"]}, "expected gptq or gptq_v2, found ['gptq']"),
    "two formats": ({"format": "gptq"}, "expected gptq or gptq_v2, found 'gptq'"),
    "another method": ({"quant_method": "awq"}, "expected quant_method 'gptq', found 'awq'"),
    "another word": ({"pack_dtype": "int64"}, "pack_dtype: expected int32, found 'int64'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_of_another_kind_is_refused(
    refused: Refused, gptq_copy: Path, change_config: Change, case: str
) -> None:
    update, message = CONFIGS[case]
    change_config(gptq_copy, lambda config: config["quantization_config"].update(update))
    assert message in refused(gptq_copy)


@pytest.mark.parametrize("found", [None, [], "gptq"])
def test_a_config_without_settings_is_refused(
    refused: Refused, gptq_copy: Path, change_config: Change, found: Any
) -> None:
    (gptq_copy / "quantize_config.json").unlink()
    change_config(gptq_copy, lambda config: config.update(quantization_config=found))
    assert "expected the quantization_config of a GPTQ checkpoint" in refused(gptq_copy)


def test_settings_in_a_file_of_their_own_are_read(gptq_copy: Path, change_config: Change, tmp_path: Path) -> None:
    change_config(gptq_copy, lambda config: config.pop("quantization_config"))
    import_gptq(gptq_copy, tmp_path / "out", QUIET)
    verify(tmp_path / "out")


def test_rules_of_the_file_are_never_run(
    gptq_copy: Path, change_config: Change, integer_mixtral: Path, tmp_path: Path
) -> None:
    """Widths come from the shapes: neither a wrong rule nor one that takes forever matters."""
    rules = {"+:.*": {"bits": 2}, "+:(.*)*(.*)*$^": {"bits": 3}, "((": {}}
    change_config(gptq_copy, lambda config: config["quantization_config"].update(dynamic=rules, bits=7))
    import_gptq(gptq_copy, tmp_path / "out", QUIET)
    assert load_config(tmp_path / "out").experts == load_config(integer_mixtral).experts


def test_a_zero_point_of_0_in_version_1_is_refused(
    refused: Refused, gptq_copy: Path, change_tensor: Change, change_config: Change
) -> None:
    change_config(gptq_copy, lambda config: config["quantization_config"].update(checkpoint_format="gptq"))
    change_tensor(gptq_copy, f"{EXPERT}.qzeros", torch.full((2, 12), -1, dtype=torch.int32))
    assert "save the model with checkpoint_format gptq_v2" in refused(gptq_copy)


def replace(folder: Path, change_tensor: Change, base: str, tensors: dict[str, torch.Tensor]) -> None:
    for suffix, tensor in tensors.items():
        change_tensor(folder, f"{base}.{suffix}", tensor)


def quantized(rows: int, columns: int, bits: int, zero: int, groups: int = 2) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(0))
    zeros = torch.full((rows, groups), zero)
    return encode(pack(codes, bits), torch.full((rows, groups), 0.003), zeros, bits, "v2")


def test_an_expert_of_several_widths_is_refused(refused: Refused, gptq_copy: Path, change_tensor: Change) -> None:
    replace(gptq_copy, change_tensor, EXPERT, quantized(128, 64, 4, 8))
    assert "experts.1: expected one width, found w1 4, w3 3, w2 3 bits" in refused(gptq_copy)


def test_experts_of_several_group_sizes_are_refused(refused: Refused, gptq_copy: Path, change_tensor: Change) -> None:
    replace(gptq_copy, change_tensor, EXPERT, quantized(128, 64, 3, 4, groups=1))
    assert "expected experts with one group size" in refused(gptq_copy)


def test_an_expert_that_is_not_quantized_is_refused(refused: Refused, gptq_copy: Path, change_tensor: Change) -> None:
    change_tensor(gptq_copy, f"{EXPERT}.weight", torch.zeros(128, 64).bfloat16(), beside=f"{EXPERT}.qweight")
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        change_tensor(gptq_copy, f"{EXPERT}.{suffix}", None)
    assert f"{OURS}: expected a quantized matrix, found an unquantized one" in refused(gptq_copy)


STRAYS = {
    "an expert too many": "model.layers.0.mlp.experts.8.gate_proj.weight",
    "a bias": f"{EXPERT}.bias",
}


@pytest.mark.parametrize("case", STRAYS)
def test_strays_below_the_experts_are_refused(
    refused: Refused, gptq_copy: Path, change_tensor: Change, case: str
) -> None:
    change_tensor(gptq_copy, STRAYS[case], torch.zeros(128), beside=f"{EXPERT}.qweight")
    assert "belongs to no expert" in refused(gptq_copy)


def test_one_tensor_under_two_names_is_refused(refused: Refused, gptq_copy: Path, change_tensor: Change) -> None:
    for suffix, tensor in quantized(128, 64, 3, 4).items():
        change_tensor(gptq_copy, f"{OURS}.{suffix}", tensor, beside=f"{EXPERT}.qweight")
    assert f"one tensor that means {OURS}" in refused(gptq_copy)


@pytest.mark.parametrize("name", ["a b.weight", "x" * 600 + ".weight", "model.layers." + "9" * 5000 + ".x.weight"])
def test_names_that_no_config_can_hold_are_refused(
    refused: Refused, gptq_copy: Path, change_tensor: Change, name: str
) -> None:
    change_tensor(gptq_copy, name, torch.zeros(32, 32), beside=f"{EXPERT}.qweight")
    assert refused(gptq_copy)


def test_the_names_of_the_source_are_read_as_well(
    gptq_copy: Path, change_tensor: Change, integer_mixtral: Path, tmp_path: Path
) -> None:
    with SourceModel(gptq_copy) as model:
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            change_tensor(gptq_copy, f"{OURS}.{suffix}", model.shards.load(f"{EXPERT}.{suffix}"), f"{EXPERT}.{suffix}")
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        change_tensor(gptq_copy, f"{EXPERT}.{suffix}", None)
    import_gptq(gptq_copy, tmp_path / "out", QUIET)
    assert load_config(tmp_path / "out").experts == load_config(integer_mixtral).experts


ODD_LINEARS = {
    "asymmetric": (4, 7, "it is not symmetric"),
    "three bits": (3, 4, "linears of 3 bits are not packed"),
    "another width": (8, 128, "vLLM joins it with a linear of another width"),
}


@pytest.mark.parametrize("case", ODD_LINEARS)
def test_linears_without_a_packed_form_are_dequantized(
    moeq: Moeq, gptq_copy: Path, change_tensor: Change, tmp_path: Path, case: str
) -> None:
    """And with one of q, k, v the other two, which vLLM loads together with it."""
    bits, zero, reason = ODD_LINEARS[case]
    tensors = quantized(64, 64, bits, zero)
    replace(gptq_copy, change_tensor, QUERY, tensors)
    outcome = moeq("import", gptq_copy, "-o", tmp_path / "out")
    assert (outcome.code, f": dequantized, since {reason}" in outcome.err) == (0, True)
    config = load_config(tmp_path / "out")
    parent = QUERY.rpartition(".")[0]
    assert {f"{parent}.{name}" for name in ("q_proj", "k_proj", "v_proj")} <= set(config.unquantized)
    assert f"{parent}.o_proj" not in config.unquantized
    verify(tmp_path / "out")
    codes = torch.randint(0, 2**bits, (64, 64), generator=torch.Generator().manual_seed(0))
    expected = (codes - zero).float() * torch.tensor(0.003).half().float()
    assert torch.equal(ShardSet(tmp_path / "out").load(f"{QUERY}.weight"), expected.bfloat16())


def test_a_linear_of_another_width_stays_packed(gptq_copy: Path, change_tensor: Change, tmp_path: Path) -> None:
    output = f"{QUERY.rpartition('.')[0]}.o_proj"
    replace(gptq_copy, change_tensor, output, quantized(64, 64, 8, 128))
    import_gptq(gptq_copy, tmp_path / "out", QUIET)
    config = load_config(tmp_path / "out")
    assert (config.format_version, config.linear.bits, config.linear.widths) == (2, 4, {output: 8})
    assert verify(tmp_path / "out").linears == {4: 7, 8: 1}
    export_gptq(tmp_path / "out", tmp_path / "back", "v2", QUIET)
    rules = read_json(tmp_path / "back" / "config.json")["quantization_config"]["dynamic"]
    found = [rule for pattern, rule in rules.items() if re.match(pattern.removeprefix("+:"), output)]
    assert found == [{"bits": 8, "group_size": 32}]


def test_scales_that_bfloat16_would_round_stay_half(gptq_copy: Path, change_tensor: Change, tmp_path: Path) -> None:
    change_tensor(gptq_copy, f"{QUERY}.scales", lambda scales: torch.full_like(scales, 0.003))
    import_gptq(gptq_copy, tmp_path / "out", QUIET)
    scales = ShardSet(tmp_path / "out").load(f"{QUERY}.weight_scale")
    assert torch.equal(scales, torch.full_like(scales, 0.003, dtype=torch.float16))


def test_an_index_that_names_no_file_is_refused(refused: Refused, gptq_copy: Path) -> None:
    index = gptq_copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][f"{EXPERT}.qweight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert refused(gptq_copy)
