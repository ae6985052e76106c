from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from planner.model.source import SourceModel
from planner.quantization.packed import PackedMatrix, pack_matrix
from planner.quantization.quantizers import quantize_linear, quantizer_for
from planner.quantization.rows import open_threads, quantize_linear_rows, quantize_rows
from vllm_moeq.format import SCALE, CheckpointError, Linear

COLUMNS = 1024


def model_of(folder: Path, weight: torch.Tensor) -> SourceModel:
    save_file({"w": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return SourceModel(folder)


@pytest.fixture
def weight() -> torch.Tensor:
    """Two whole parts and some rows."""
    return torch.randn(1111, COLUMNS, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def assert_same(found: PackedMatrix, expected: PackedMatrix) -> None:
    assert list(found.tensors) == list(expected.tensors)
    for one, other in zip(found.tensors.values(), expected.tensors.values(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert found.squared_error == pytest.approx(expected.squared_error, rel=1e-12)
    assert found.squared_norm == pytest.approx(expected.squared_norm, rel=1e-12)


@pytest.mark.parametrize(
    ("quantizer", "bits"), [("sign", 1), ("hqq", 1), ("hqq", 3), ("hqq", 4), ("rtn", 2), ("rtn", 8)]
)
@pytest.mark.parametrize("group_size", [128, -1])
def test_parts_are_those_of_the_whole_matrix(
    tmp_path: Path, weight: torch.Tensor, quantizer: str, bits: int, group_size: int
) -> None:
    function = quantizer_for(bits, quantizer, quantizer)
    with open_threads(1):  # one thread, as for each part
        expected = pack_matrix(weight, function(weight, bits, group_size))
    with model_of(tmp_path, weight) as model, open_threads(3) as threads:
        assert_same(quantize_rows(threads, model, "w", function, bits, group_size), expected)


def test_rows_that_need_bfloat16_give_all_rows_bfloat16(tmp_path: Path, weight: torch.Tensor) -> None:
    weight[-1] *= 2.0**-30
    function = quantizer_for(3, "rtn", "sign")
    with model_of(tmp_path, weight) as model, open_threads(2) as threads:
        found = quantize_rows(threads, model, "w", function, 3, 128)
    assert found.tensors[SCALE].dtype == torch.bfloat16
    assert_same(found, pack_matrix(weight, function(weight, 3, 128)))


def test_linears_are_those_of_the_whole_matrix(tmp_path: Path, weight: torch.Tensor) -> None:
    spec = Linear(bits=4, group_size=128)
    with model_of(tmp_path, weight) as model, open_threads(2) as threads:
        found = quantize_linear_rows(threads, model, "w", spec)
    expected = quantize_linear(weight, spec)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[suffix], value) for suffix, value in expected.items())


def test_a_damaged_row_names_file_and_tensor(tmp_path: Path, weight: torch.Tensor) -> None:
    weight[-1, 0] = float("nan")
    with (
        model_of(tmp_path, weight) as model,
        open_threads(2) as threads,
        pytest.raises(CheckpointError, match=r"model\.safetensors: tensor w: expected finite weights"),
    ):
        quantize_rows(threads, model, "w", quantizer_for(3, "rtn", "sign"), 3, 128)


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with open_threads(2) as threads:
        assert torch.get_num_threads() == 1
        assert set(threads.pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before
