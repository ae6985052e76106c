"""A rotated checkpoint is read as an ordinary model, in the model's own basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from planner.common.progress import Progress
from planner.exchange.autogptq.export import export_gptq
from planner.exchange.dense import export_dense
from planner.model.layout import read_layout
from planner.model.quantized import DequantizedModel
from planner.model.source import SourceModel
from tests.by_hand import quantize_by_hand
from vllm_moeq.format import ShardSet, UsageError, expert_matrices, load_config


@pytest.fixture(scope="module")
def quantized(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotated") / "quantized"
    widths = [8, 4, 3, 4]
    return quantize_by_hand(
        tiny_mixtral, folder, lambda layer: widths * (layer.num_experts // len(widths)), scheme="trellis"
    )


def test_its_layout_is_the_sources(quantized: Path, tiny_mixtral: Path) -> None:
    with DequantizedModel(quantized) as model, SourceModel(tiny_mixtral) as source:
        assert read_layout(model).layers == read_layout(source).layers


def test_its_weights_are_near_the_sources(quantized: Path, tiny_mixtral: Path) -> None:
    """In another basis they would have nothing in common."""
    with DequantizedModel(quantized) as model, SourceModel(tiny_mixtral) as source, ShardSet(quantized) as shards:
        for matrix in expert_matrices(shards, load_config(quantized)):
            name = matrix.name("weight")
            found, exact = model.shards.load(name), source.shards.load(name).float()
            assert float((found - exact).norm() / exact.norm()) < 0.2
            assert torch.equal(found, matrix.dequantize(shards))
            assert torch.equal(model.shards.read_rows(name, 3, 21), found[3:21])


def test_its_dense_export_has_these_weights(quantized: Path, tmp_path: Path) -> None:
    export_dense(quantized, tmp_path / "dense", Progress(quiet=True), torch.float32)
    with DequantizedModel(quantized) as model, SourceModel(tmp_path / "dense") as dense:
        assert not [name for name in dense.shards.tensors if "signs" in name]
        for layer in read_layout(dense).layers:
            for expert in range(layer.num_experts):
                for projection in layer.projections.names():
                    name = layer.weight(expert, projection)
                    assert torch.equal(dense.shards.load(name), model.shards.load(name))


def test_gptqs_format_cannot_hold_it(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected experts that are not rotated"):
        export_gptq(quantized, tmp_path / "gptq", "v2", Progress(quiet=True))
    assert not (tmp_path / "gptq").exists()
