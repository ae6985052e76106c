from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from planner.common.progress import Progress
from planner.exchange.dense import export_dense
from planner.output.checkpoint import CheckpointWriter
from vllm_moeq.format import CheckpointError, ShardSet, UsageError, dequantize, load_config, unpack

QUIET = Progress(quiet=True)
LAYER = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def dense(quantized_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "dense"
    export_dense(quantized_mixtral, output, QUIET)
    return output


@pytest.mark.parametrize("projection", ["w1", "w2", "w3"])
@pytest.mark.parametrize("expert", range(8))
def test_experts_are_their_dequantized_values(
    quantized_mixtral: Path, dense: Path, expert: int, projection: str
) -> None:
    shards, name = ShardSet(quantized_mixtral), f"{LAYER}.{expert}.{projection}"
    bits = load_config(quantized_mixtral).experts[LAYER][expert]
    codes = unpack(shards.load(f"{name}.weight_packed"), bits, 128 if projection == "w2" else 64)
    expected = dequantize(codes, shards.load(f"{name}.weight_scale"), shards.load(f"{name}.weight_zero"))
    assert torch.equal(ShardSet(dense).load(f"{name}.weight"), expected.bfloat16())


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("quantized_mixtral", f"{LAYER}.3.w2.weight_scale"),
        ("quantized_mixtral", "model.norm.weight"),
        ("trellis_mixtral", f"{LAYER}.3.w2.weight_row_scale"),
    ],
)
def test_values_that_no_model_has_are_not_exported(
    base: str, name: str, request: pytest.FixtureRequest, tmp_path: Path, change_tensor: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(base), tmp_path / "damaged"))
    change_tensor(folder, name, lambda values: values * float("nan"))
    with pytest.raises(CheckpointError, match=f"{name}: expected finite values"):
        export_dense(folder, tmp_path / "dense", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_linears_are_what_compressed_tensors_reads(quantized_mixtral: Path, dense: Path) -> None:
    shards, name = ShardSet(quantized_mixtral), "model.layers.1.self_attn.k_proj"
    spec = load_config(quantized_mixtral).linear
    shape = torch.Size(shards.load(f"{name}.weight_shape").tolist())
    codes = unpack_from_int32(shards.load(f"{name}.weight_packed"), spec.bits, shape)
    scales = shards.load(f"{name}.weight_scale").float().repeat_interleave(spec.group_size, dim=1)
    assert torch.equal(ShardSet(dense).load(f"{name}.weight"), (codes.float() * scales).bfloat16())


def test_it_has_the_tensors_of_the_source(tiny_mixtral: Path, dense: Path) -> None:
    def shapes(folder: Path) -> dict[str, Any]:
        return {name: (info.shape, info.dtype) for name, info in ShardSet(folder).tensors.items()}

    assert shapes(dense) == shapes(tiny_mixtral)


def test_kept_tensors_are_the_sources(tiny_mixtral: Path, dense: Path) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight"):
        assert torch.equal(ShardSet(dense).load(name), ShardSet(tiny_mixtral).load(name))


def test_transformers_loads_every_tensor(dense: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert {kind: list(names) for kind, names in report.items() if names} == {}


def test_transformers_computes_with_the_quantized_values(tiny_mixtral: Path, dense: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40)[None]
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (tiny_mixtral, dense)
        ]
    difference = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 0 < difference < 0.2


def test_an_existing_output_is_refused(quantized_mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_dense(quantized_mixtral, tmp_path / "dense", QUIET)


def test_a_second_writer_is_refused(quantized_mixtral: Path, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "dense", {})
    with pytest.raises(UsageError, match="another run is writing"):
        export_dense(quantized_mixtral, tmp_path / "dense", QUIET)
    writer.abandon()


def test_a_damaged_checkpoint_leaves_nothing(
    quantized_copy: Path, change_tensor: Callable[..., Path], tmp_path: Path
) -> None:
    change_tensor(quantized_copy, f"{LAYER}.3.w1.weight_zero", None)
    with pytest.raises(CheckpointError, match=f"{LAYER}.3.w1.weight_zero is missing"):
        export_dense(quantized_copy, tmp_path / "dense", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == [quantized_copy.name]
