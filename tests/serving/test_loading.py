"""Our weight loaders: slices of tensor and expert parallelism, completeness, damaged tensors."""

from __future__ import annotations

import pytest
import torch

from planner.quantization.quantizers import Quantized, quantize_rtn
from vllm_moeq.format import (
    PACKED,
    SCALE,
    ZERO,
    CheckpointError,
    MoeqConfig,
    Rotation,
    UsageError,
    pack,
    parse_config,
)
from vllm_moeq.kernels import dense_expert
from vllm_moeq.serving.loading import ExpertLoader, Partition

HIDDEN, INTERMEDIATE = 128, 256
WIDTHS = (1, 3, 8)
PROJECTIONS = {"w1": "w1", "w3": "w3", "w2": "w2"}


def make_config(group_size: int) -> MoeqConfig:
    return parse_config(
        {
            "quant_method": "moeq",
            "format_version": 1,
            "group_size": group_size,
            "projections": {"gate": "w1", "up": "w3", "down": "w2"},
            "experts": {"layer.experts": list(WIDTHS)},
            "linear": {"bits": 16, "group_size": 128},
            "unquantized": [],
            "plan": {"method": "x", "avg_bits": 4.0, "achieved_avg_bits": 4.0, "bit_choices": [1, 3, 8]},
        },
        "test",
    )


def quantized_experts(group_size: int) -> dict[tuple[int, str], Quantized]:
    """Return {(expert, shard): Quantized} of random matrices."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}
    return {
        (expert, shard): quantize_rtn(torch.randn(shape, generator=generator), bits, group_size)
        for expert, bits in enumerate(WIDTHS)
        for shard, shape in shapes.items()
    }


class Rank:
    """One rank's parameters and their loaders."""

    def __init__(self, group_size: int, ranks: int = 1, rank: int = 0, experts: tuple[int, ...] = (0, 1, 2)) -> None:
        share = INTERMEDIATE // ranks
        self.partition = Partition("layer.experts", make_config(group_size), WIDTHS, experts, HIDDEN, share, rank)
        self.loader = ExpertLoader(self.partition)
        self.parameters = {}
        for name, matrices in (("w13", self.partition.w13), ("w2", self.partition.w2)):
            scales = torch.empty(len(experts), matrices.rows, matrices.groups, dtype=torch.float16)
            words = torch.empty(matrices.num_words, dtype=torch.int32)
            for suffix, tensor in ((PACKED, words), (SCALE, scales), (ZERO, scales.clone())):
                self.parameters[name, suffix] = torch.nn.Parameter(tensor, requires_grad=False)

    def load(self, expert: int, shard: str, suffix: str, tensor: torch.Tensor) -> bool | None:
        name = "w2" if shard == "w2" else "w13"
        load = self.loader.loader_for(suffix)
        return load(self.parameters[name, suffix], tensor, f"experts.{name}_{suffix}", shard, expert, True)

    def load_all(self, group_size: int, skip: tuple[int, str, str] | None = None) -> None:
        for (expert, shard), result in quantized_experts(group_size).items():
            tensors = {PACKED: pack(result.codes, result.bits), SCALE: result.scales, ZERO: result.zeros}
            for suffix, tensor in tensors.items():
                if (expert, shard, suffix) != skip:
                    self.load(expert, shard, suffix, tensor)

    def dense(self, name: str, local: int) -> torch.Tensor:
        matrices = self.partition.w2 if name == "w2" else self.partition.w13
        words, scales, zeros = (self.parameters[name, suffix].data for suffix in (PACKED, SCALE, ZERO))
        return dense_expert(matrices, local, words, scales, zeros, torch.float32)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_together_hold_the_whole_layer(group_size: int, ranks: int) -> None:
    share = INTERMEDIATE // ranks
    whole = quantized_experts(group_size)
    for rank in range(ranks):
        part = Rank(group_size, ranks, rank)
        part.load_all(group_size)
        part.loader.check_complete()
        rows = slice(rank * share, (rank + 1) * share)
        for expert in range(len(WIDTHS)):
            gate, up = part.dense("w13", expert).chunk(2)
            assert torch.equal(gate, whole[expert, "w1"].dequantize()[rows])
            assert torch.equal(up, whole[expert, "w3"].dequantize()[rows])
            assert torch.equal(part.dense("w2", expert), whole[expert, "w2"].dequantize()[:, rows])


def test_expert_parallel_rank_keeps_only_its_experts() -> None:
    part = Rank(128, experts=(2,))
    result = quantized_experts(128)[0, "w1"]
    assert part.load(0, "w1", PACKED, pack(result.codes, 1)) is False
    part.load_all(128)
    part.loader.check_complete()
    assert torch.equal(part.dense("w2", 0), quantized_experts(128)[2, "w2"].dequantize())


@pytest.mark.parametrize("suffix", [PACKED, SCALE, ZERO])
def test_missing_tensor_is_named(suffix: str) -> None:
    part = Rank(128)
    part.load_all(128, skip=(1, "w3", suffix))
    with pytest.raises(CheckpointError, match=rf"layer\.experts\.1\.w3\.{suffix} was not loaded"):
        part.loader.check_complete()


def test_duplicate_tensor_is_named() -> None:
    part = Rank(128)
    part.load_all(128)
    result = quantized_experts(128)[0, "w1"]
    with pytest.raises(CheckpointError, match=r"layer\.experts\.0\.w1\.weight_scale is in the checkpoint twice"):
        part.load(0, "w1", SCALE, result.scales)


def test_wrong_shape_is_named() -> None:
    result = quantized_experts(128)[1, "w1"]
    with pytest.raises(CheckpointError, match=r"layer\.experts\.1\.w1\.weight_packed: expected \[256, 12\]"):
        Rank(128).load(1, "w1", PACKED, pack(result.codes, 4)[:, :16])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_bad_scale_is_named(value: float) -> None:
    scales = quantized_experts(128)[1, "w2"].scales.clone()
    scales[3, 1] = value
    with pytest.raises(CheckpointError, match=r"layer\.experts\.1\.w2\.weight_scale"):
        Rank(128).load(1, "w2", SCALE, scales)


def test_bfloat16_scales_beyond_half_precision_are_kept_exactly() -> None:
    part = Rank(128)
    scales = quantized_experts(128)[0, "w1"].scales.bfloat16() * 2.0**-30
    part.load(0, "w1", SCALE, scales)
    stored = part.parameters["w13", SCALE].data[0, :INTERMEDIATE]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, scales.float())


SMALLER = "lower --tensor-parallel-size or add --enable-expert-parallel"


@pytest.mark.parametrize(
    ("schemes", "inner", "whole", "ranks", "fitting", "step"),
    [
        ("grid", None, 256, 16, "1 or 2 or 4 or 8", 32),
        ("grid", None, 96, 2, "1", 32),
        ("trellis", None, 96, 6, "1 or 3", 32),
        ("trellis", 128, 768, 4, "1 or 2", 128),
        ("grid", 128, 768, 12, "1 or 2 or 3 or 6", 128),
        ("trellis", 16, 256, 16, "1 or 2 or 4 or 8", 32),
    ],
)
@pytest.mark.parametrize("part", ["w13", "w2"])
def test_slices_that_would_tear_words_tiles_or_blocks_are_refused(
    schemes: str, inner: int | None, whole: int, ranks: int, fitting: str, step: int, part: str
) -> None:
    """Before any buffer is allocated; the message says how many ranks fit."""
    config = make_config(128).model_copy(
        update={
            "rotation": None if inner is None else Rotation.model_validate({"input": 64, "inner": inner}),
            "schemes": {"layer.experts": [schemes, schemes, "grid"]},
        }
    )
    with pytest.raises(UsageError) as error:
        getattr(Partition("layer.experts", config, WIDTHS, (0, 1, 2), HIDDEN, whole // ranks, 1, ranks), part)
    size = f"so that each gets a multiple of {step} of the intermediate size {whole}"
    assert str(error.value) == (
        f"layer.experts: expected {fitting} as the number of ranks, {size}, found {ranks}; {SMALLER}"
    )
    for fewer in map(int, fitting.split(" or ")):
        share = Partition("layer.experts", config, WIDTHS, (0, 1, 2), HIDDEN, whole // fewer, fewer - 1, fewer)
        assert share.w2.columns == whole // fewer
