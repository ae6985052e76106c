"""Our checkpoints in AutoGPTQ's format and back."""

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
from planner.exchange.autogptq.layout import decode_zeros, encode
from tests.architectures import build
from tests.conftest import one_line
from tests.paths import MODELS, SHIPPED
from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import ShardSet, load_config, pack, verify

EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1"
ATTENTION = "model.layers.0.self_attn"
QUIET = Progress(quiet=True)

Moeq = Callable[..., Any]
Change = Callable[..., Any]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_identical(first: Path, second: Path) -> None:
    """Every tensor in the same shard, with the same dtype, shape and bytes.

    Scales and zero points alone may have another dtype: ours are bfloat16 where a scale is small, GPTQ's are float16.
    """
    with ShardSet(first) as one, ShardSet(second) as two:
        assert {name: (at.shard, at.shape) for name, at in one.tensors.items()} == {
            name: (at.shard, at.shape) for name, at in two.tensors.items()
        }
        for name in one.tensors:
            before, after = one.load(name), two.load(name)
            if name.endswith((".weight_scale", ".weight_zero")) and before.dtype == torch.bfloat16:
                assert torch.equal(before.float(), after.float()), name
            else:
                assert before.dtype == after.dtype, name
                assert torch.equal(bits_of(before), bits_of(after)), name


@pytest.mark.parametrize("model", SHIPPED)
@pytest.mark.parametrize(("quantizer", "linear_bits", "group_size"), [("rtn", 4, 128), ("hqq", 16, -1), ("hqq", 8, 64)])
def test_trained_models_come_back_bit_by_bit(
    integer_checkpoint: Callable[..., Path],
    tmp_path: Path,
    model: str,
    quantizer: str,
    linear_bits: int,
    group_size: int,
) -> None:
    source = integer_checkpoint(MODELS / model, quantizer, linear_bits, group_size)
    export_gptq(source, tmp_path / "gptq", "v2", QUIET)
    import_gptq(tmp_path / "gptq", tmp_path / "back", QUIET)
    assert_identical(source, tmp_path / "back")
    before, after = load_config(source), load_config(tmp_path / "back")
    for key in ("experts", "group_size", "projections", "unquantized"):
        assert getattr(before, key) == getattr(after, key)
    assert before.linear.bits == after.linear.bits
    verify(tmp_path / "back")


@pytest.mark.parametrize("name", ["llama4", "deepseek_v3", "ernie4_5_moe"])
def test_architectures_with_other_names_come_back(
    integer_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """A language model inside another, dense layers before the experts, biases of routers."""
    build(name, tmp_path / name)
    source = integer_checkpoint(tmp_path / name, "rtn", 4, 32)
    export_gptq(source, tmp_path / "gptq", "v2", QUIET)
    import_gptq(tmp_path / "gptq", tmp_path / "back", QUIET)
    assert_identical(source, tmp_path / "back")
    assert verify_whole(tmp_path / "back").only_experts is None


def test_several_shards_and_version_1_come_back(integer_copy: Path, change_tensor: Change, tmp_path: Path) -> None:
    with ShardSet(integer_copy) as shards:
        zeros = [name for name in shards.tensors if name.endswith(".weight_zero")]
    for name in zeros:
        change_tensor(integer_copy, name, lambda zero: zero.clamp_min(1))
    export_gptq(integer_copy, tmp_path / "gptq", "v1", QUIET)
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["checkpoint_format"] == "gptq"
    import_gptq(tmp_path / "gptq", tmp_path / "back", QUIET)
    assert_identical(integer_copy, tmp_path / "back")


def test_companions_and_the_rest_of_the_config_come_along(gptq_mixtral: Path, tiny_mixtral: Path) -> None:
    config = json.loads((gptq_mixtral / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((tiny_mixtral / "config.json").read_text())
    assert (settings["checkpoint_format"], settings["desc_act"], settings["sym"]) == ("gptq_v2", False, False)
    assert (gptq_mixtral / "generation_config.json").exists()


def test_the_first_rule_that_matches_has_the_width(gptq_mixtral: Path, integer_mixtral: Path) -> None:
    settings = json.loads((gptq_mixtral / "config.json").read_text())["quantization_config"]
    for prefix, widths in load_config(integer_mixtral).experts.items():
        for expert, bits in enumerate(widths):
            name = f"{prefix.replace('block_sparse_moe', 'mlp')}.{expert}.gate_proj"
            rules = (
                rule for pattern, rule in settings["dynamic"].items() if re.match(pattern.removeprefix("+:"), name)
            )
            assert next(rules, settings)["bits"] == bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_layout_is_the_documented_one(bits: int, version: Any) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (64, 128), generator=generator)
    zeros = torch.randint(1, 2**bits, (64, 4), generator=generator)
    tensors = encode(pack(codes, bits), torch.ones(64, 4), zeros, bits, version)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": [128 * bits // 32, 64],
        "qzeros": [4, 64 * bits // 32],
        "scales": [4, 64],
        "g_idx": [128],
    }
    column = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(tensors["qweight"][:, 5]))
    assert [column >> bits * k & 2**bits - 1 for k in range(128)] == codes[5].tolist()
    row = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(tensors["qzeros"][2]))
    stored = [row >> bits * n & 2**bits - 1 for n in range(64)]
    assert stored == (zeros[:, 2] - (1 if version == "v1" else 0)).tolist()
    assert torch.equal(decode_zeros(tensors["qzeros"], bits, 64, version), zeros.to(torch.uint8))


def test_experts_of_one_bit_are_refused(moeq: Moeq, quantized_mixtral: Path, tmp_path: Path) -> None:
    message = one_line(moeq("export", quantized_mixtral, "--format", "gptq", "-o", tmp_path / "out"))
    assert "4 experts have 1 bit" in message
    assert "--zero-points integer" in message
    assert list(tmp_path.iterdir()) == []


def zero(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill_(1, torch.tensor([0]), value)


def bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16()


UNEXPORTABLE = {
    "between codes": ("weight_zero", zero(1.5), "v2", "integers 0 to 7, as GPTQ stores zero points, found 1.5"),
    "below": ("weight_zero", zero(-1), "v2", "integers 0 to 7, as GPTQ stores zero points, found -1"),
    "above": ("weight_zero", zero(8), "v2", "integers 0 to 7, as GPTQ stores zero points, found 8"),
    "version 1": ("weight_zero", zero(0), "v1", "version 1 cannot hold, found one; use --zero-points v2"),
}


@pytest.mark.parametrize("case", UNEXPORTABLE)
def test_zero_points_that_do_not_fit_are_refused(
    moeq: Moeq, integer_copy: Path, change_tensor: Change, tmp_path: Path, case: str
) -> None:
    suffix, edit, version, message = UNEXPORTABLE[case]
    with ShardSet(integer_copy) as shards:
        names = [name for name in shards.tensors if name.endswith(".weight_zero")]
    for name in names if version == "v1" else ():
        change_tensor(integer_copy, name, lambda tensor: tensor.clamp_min(1))
    shard = change_tensor(integer_copy, f"{EXPERT}.{suffix}", edit)
    flags = ("--format", "gptq", "--zero-points", version, "-o", tmp_path / "out")
    found = one_line(moeq("export", integer_copy, *flags))
    assert f"{shard}: tensor {EXPERT}.{suffix}: expected " in found
    assert message in found
    assert [path.name for path in tmp_path.iterdir()] == [integer_copy.name]


def test_scales_beyond_half_precision_are_refused(
    moeq: Moeq, integer_copy: Path, change_tensor: Change, tmp_path: Path
) -> None:
    change_tensor(integer_copy, f"{EXPERT}.weight_zero", bfloat16)
    change_tensor(
        integer_copy, f"{EXPERT}.weight_scale", lambda tensor: torch.full_like(tensor, 1e-9, dtype=torch.bfloat16)
    )
    message = one_line(moeq("export", integer_copy, "--format", "gptq", "-o", tmp_path / "out"))
    assert f"tensor {EXPERT}.weight_scale: expected scales that float16" in message


def test_zero_points_are_a_matter_of_gptq(moeq: Moeq, integer_mixtral: Path, tmp_path: Path) -> None:
    assert "--format gptq" in one_line(moeq("export", integer_mixtral, "--zero-points", "v1", "-o", tmp_path / "out"))


def test_a_copy_as_gptq_and_back_by_command(moeq: Moeq, integer_mixtral: Path, tmp_path: Path) -> None:
    assert moeq("export", integer_mixtral, "--format", "gptq", "-o", tmp_path / "gptq").code == 0
    assert moeq("import", tmp_path / "gptq", "-o", tmp_path / "back").code == 0
    assert_identical(integer_mixtral, tmp_path / "back")
    assert moeq("verify", tmp_path / "back").code == 0
