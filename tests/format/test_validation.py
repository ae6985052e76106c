from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_moeq.format import CheckpointError, ConfigError, MoeqError, expert_matrices, load_config, verify
from vllm_moeq.format.shards import ShardSet

LAYER = "model.layers.0.block_sparse_moe.experts"
EIGHT_BIT = f"{LAYER}.0.w1"
TWO_BIT = f"{LAYER}.3.w2"
ATTENTION = "model.layers.1.self_attn.q_proj"

Change = Callable[..., Path]


def refusal(folder: Path, **options: bool) -> str:
    with pytest.raises(MoeqError) as error:
        verify(folder, **options)
    return str(error.value)


def test_a_fresh_checkpoint_is_valid(quantized_mixtral: Path) -> None:
    summary = verify(quantized_mixtral)
    assert (summary.layers, summary.experts) == (2, 16)
    assert summary.widths == {1: 4, 2: 4, 3: 4, 4: 2, 8: 2}
    assert summary.average_bits == pytest.approx(3.0)


def test_the_summary_counts_every_byte(quantized_mixtral: Path) -> None:
    tensors = ShardSet(quantized_mixtral).tensors.values()
    assert verify(quantized_mixtral).total_bytes == sum(info.nbytes for info in tensors)


def test_every_expert_matrix_is_listed_once(quantized_mixtral: Path) -> None:
    config = load_config(quantized_mixtral)
    found = [(m.prefix, m.expert, m.projection) for m in expert_matrices(ShardSet(quantized_mixtral), config)]
    assert len(found) == len(set(found)) == 2 * 8 * 3


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero"])
def test_a_missing_expert_tensor_is_named(quantized_copy: Path, change_tensor: Change, suffix: str) -> None:
    change_tensor(quantized_copy, f"{TWO_BIT}.{suffix}", None)
    assert f"tensor {TWO_BIT}.{suffix} is missing" in refusal(quantized_copy)


def test_a_truncated_shard_is_named(quantized_copy: Path, shard_of: Callable[..., Path]) -> None:
    shard = shard_of(quantized_copy, f"{EIGHT_BIT}.weight_packed")
    shard.write_bytes(shard.read_bytes()[:-7])
    assert f"{shard}: damaged or truncated" in refusal(quantized_copy)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(64, 9, dtype=torch.int32),
        torch.zeros(63, 8, dtype=torch.int32),
        torch.zeros(64, 8, dtype=torch.int64),
        torch.zeros(64 * 8, dtype=torch.int32),
        torch.zeros(0, 8, dtype=torch.int32),
    ],
    ids=["words", "rows", "dtype", "dimensions", "no rows"],
)
def test_a_wrong_packed_tensor_is_named(quantized_copy: Path, change_tensor: Change, value: torch.Tensor) -> None:
    shard = change_tensor(quantized_copy, f"{TWO_BIT}.weight_packed", value)
    assert f"{shard}: tensor {TWO_BIT}.weight_packed: expected" in refusal(quantized_copy)


def test_a_width_that_differs_from_the_config_is_named(quantized_copy: Path, change_config: Change) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["quantization_config"]["experts"][LAYER][3] = 3

    change_config(quantized_copy, edit)
    assert f"tensor {LAYER}.3.w1.weight_packed: expected [128, 6] for 3 bits" in refusal(quantized_copy)


@pytest.mark.parametrize(
    "value",
    [torch.ones(64, 3), torch.ones(64, 4), torch.ones(64, 0, dtype=torch.float16), torch.ones(1, dtype=torch.float16)],
    ids=["shape", "float32", "no groups", "dimensions"],
)
def test_a_wrong_scale_is_named(quantized_copy: Path, change_tensor: Change, value: torch.Tensor) -> None:
    change_tensor(quantized_copy, f"{TWO_BIT}.weight_scale", value)
    assert f"{TWO_BIT}.weight_scale" in refusal(quantized_copy)


def test_zeros_of_another_shape_are_named(quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{TWO_BIT}.weight_zero", torch.ones(64, 2, dtype=torch.float16))
    assert f"{TWO_BIT}.weight_zero" in refusal(quantized_copy)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_zero"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(
    quantized_copy: Path, change_tensor: Change, suffix: str, bad: float
) -> None:
    name = f"{EIGHT_BIT}.{suffix}"
    shard = change_tensor(quantized_copy, name, lambda tensor: tensor.index_fill_(1, torch.tensor([1]), bad))
    assert f"{shard}: tensor {name}: expected finite values" in refusal(quantized_copy)


def test_a_scale_of_zero_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    name = f"{EIGHT_BIT}.weight_scale"
    shard = change_tensor(quantized_copy, name, torch.zeros_like)
    assert f"{shard}: tensor {name}: expected no scale of 0" in refusal(quantized_copy)


def test_values_are_not_read_when_not_asked(quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{EIGHT_BIT}.weight_scale", torch.zeros_like)
    assert verify(quantized_copy, values=False).experts == 16


@pytest.mark.parametrize("name", [f"{LAYER}.8.w1.weight_packed", f"{LAYER}.0.w4.weight_packed", f"{LAYER}.0.w1.bias"])
def test_a_stray_expert_tensor_is_named(quantized_copy: Path, change_tensor: Change, name: str) -> None:
    shard = change_tensor(quantized_copy, name, torch.zeros(2, 2), beside=f"{EIGHT_BIT}.weight_packed")
    assert f"{shard}: tensor {name} belongs to no expert" in refusal(quantized_copy)


def test_an_expert_of_another_shape_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_zero"):
        change_tensor(quantized_copy, f"{TWO_BIT}.{suffix}", lambda tensor: tensor[:32].contiguous())
    assert f"{TWO_BIT}.weight_packed: expected [64, 128] weights as in expert 0" in refusal(quantized_copy)


def test_projections_that_do_not_fit_are_named(quantized_copy: Path, change_tensor: Change) -> None:
    for expert in range(8):
        for suffix in ("weight_packed", "weight_scale", "weight_zero"):
            change_tensor(quantized_copy, f"{LAYER}.{expert}.w2.{suffix}", lambda tensor: tensor[:32].contiguous())
    assert re.search(rf"{LAYER}: gate .* do not fit", refusal(quantized_copy))


@pytest.mark.parametrize("version", [0, 3, "1", True])
def test_an_unknown_version_is_refused(quantized_copy: Path, change_config: Change, version: object) -> None:
    change_config(quantized_copy, lambda config: config["quantization_config"].update(format_version=version))
    assert f"{quantized_copy / 'config.json'}: format_version must be 1 or 2" in refusal(quantized_copy)


def test_a_model_that_is_not_quantized_is_refused(tiny_mixtral: Path) -> None:
    with pytest.raises(ConfigError, match="expected a quantization_config"):
        verify(tiny_mixtral)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
        verify(tmp_path / "none")


def test_a_linear_whose_scales_do_not_fit_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{ATTENTION}.weight_scale", torch.ones(64, 5, dtype=torch.bfloat16))
    assert f"tensor {ATTENTION}.weight_packed" in refusal(quantized_copy)


def test_a_linear_without_scales_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    change_tensor(quantized_copy, f"{ATTENTION}.weight_scale", None)
    assert f"tensor {ATTENTION}.weight_scale is missing" in refusal(quantized_copy)


@pytest.mark.parametrize("shape", [[1, 1], [-1, 1 << 40], [True, True]])
def test_a_linear_with_another_shape_is_named(quantized_copy: Path, change_tensor: Change, shape: list[int]) -> None:
    shard = change_tensor(quantized_copy, f"{ATTENTION}.weight_shape", torch.tensor(shape))
    expected = f"{shard}: tensor {ATTENTION}.weight_shape: expected the integers [64, 64], found"
    assert expected in refusal(quantized_copy)


def test_a_linear_with_scales_of_eight_bits_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    name = f"{ATTENTION}.weight_scale"
    change_tensor(quantized_copy, name, lambda tensor: torch.full_like(tensor, float("nan")).to(torch.float8_e4m3fn))
    assert f"tensor {name}: expected finite values" in refusal(quantized_copy)


def test_a_linear_with_a_scale_that_is_not_finite_is_named(quantized_copy: Path, change_tensor: Change) -> None:
    name = f"{ATTENTION}.weight_scale"
    shard = change_tensor(quantized_copy, name, lambda tensor: torch.full_like(tensor, float("nan")))
    assert f"{shard}: tensor {name}: expected finite values" in refusal(quantized_copy)


def test_packed_linears_are_refused_where_the_config_says_16_bits(quantized_copy: Path, change_config: Change) -> None:
    change_config(quantized_copy, lambda config: config["quantization_config"]["linear"].update(bits=16))
    assert "is packed but linear.bits is 16" in refusal(quantized_copy)


def test_whole_rows_need_one_scale_per_row(quantized_copy: Path, change_config: Change) -> None:
    change_config(quantized_copy, lambda config: config["quantization_config"].update(group_size=-1))
    assert "[128, 1] (one group per row)" in refusal(quantized_copy)
