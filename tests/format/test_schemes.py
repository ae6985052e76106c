"""The seam for ways of storing experts: a second one is a file and a row, and all that reads checkpoints has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_moeq.format import (
    GRID,
    SCHEMES,
    CheckpointError,
    MoeqConfig,
    Scheme,
    ShardSet,
    Span,
    TensorLayout,
    UsageError,
    dequantize,
    expert_matrices,
    load_config,
    pack,
    verify,
)
from vllm_moeq.format.tensors import Tensors
from vllm_moeq.kernels import TABLE, PackedExperts, PackedMatrices, choose, make_layer, of_one_dtype
from vllm_moeq.serving.loading import ExpertLoader, Partition

LAYER = "model.layers.0.mlp.experts"
HIDDEN, INTERMEDIATE, GROUP = 64, 96, 32
WIDTHS = (8, 3, 8, 2)
SHAPES = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
SHARDS = {"gate": "w1", "up": "w3", "down": "w2"}


# ruff: noqa: ARG002  (signatures that Scheme prescribes)
class ByteRows(Scheme):
    """w = (q − 128) · step: a byte per weight, and one step per row."""

    name = "byte rows"
    suffixes = ("weight_bytes", "weight_step")
    checked = ("weight_step",)
    widths = (8,)
    column_step = 16

    def layout(
        self, rows: int, columns: int, bits: int, group_size: int, group_offset: int = 0
    ) -> dict[str, TensorLayout]:
        return {
            "weight_bytes": TensorLayout((torch.uint8,), (rows, columns)),
            "weight_step": TensorLayout((torch.float16, torch.bfloat16), (rows,)),
        }

    def read_shape(self, shards: Tensors, base: str, bits: int, group_size: int) -> tuple[int, int]:
        rows, columns = shards.info(f"{base}.weight_bytes").shape
        return rows, columns

    def cut(
        self, suffix: str, bits: int, group_size: int, *, rows: Span | None = None, columns: Span | None = None
    ) -> tuple[slice, ...]:
        height = slice(*rows) if rows else slice(None)
        return (height, slice(*columns)) if columns and suffix == self.codes else (height,)

    def dequantize(
        self, tensors: Mapping[str, torch.Tensor], bits: int, group_size: int, group_offset: int = 0
    ) -> torch.Tensor:
        return (tensors["weight_bytes"].float() - 128) * tensors["weight_step"].float()[:, None]


ROWS = ByteRows()


@pytest.fixture(autouse=True)
def two_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 0 is stored by rows; the others by the grid, expert 2 with the same width."""
    monkeypatch.setitem(SCHEMES, ROWS.name, ROWS)
    monkeypatch.setattr(MoeqConfig, "scheme", lambda _, __, expert: GRID if expert else SCHEMES[ROWS.name])


def tensors_of(expert: int, projection: str, factor: float = 1.0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a random matrix as a file has it, and its weights."""
    rows, columns = SHAPES[projection]
    generator = torch.Generator().manual_seed(10 * expert + len(projection))
    codes = torch.randint(0, 2 ** WIDTHS[expert], (rows, columns), generator=generator, dtype=torch.uint8)
    if expert == 0:
        step = (torch.rand(rows, generator=generator) + 0.1).bfloat16() * factor
        return {"weight_bytes": codes, "weight_step": step}, (codes.float() - 128) * step.float()[:, None]
    scales = (torch.rand((rows, columns // GROUP), generator=generator) + 0.1).half()
    tensors = {"weight_packed": pack(codes, WIDTHS[expert]), "weight_scale": scales, "weight_zero": scales + 1}
    return tensors, dequantize(codes, scales, scales + 1)


def make_checkpoint(folder: Path, factor: float = 1.0) -> Path:
    config = {
        "quant_method": "moeq",
        "format_version": 1,
        "group_size": GROUP,
        "projections": {"gate": "gate", "up": "up", "down": "down"},
        "experts": {LAYER: list(WIDTHS)},
        "linear": {"bits": 16},
        "unquantized": [],
        "plan": {"method": "x", "avg_bits": 5.25, "achieved_avg_bits": 5.25, "bit_choices": [2, 3, 8]},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors = {
        f"{LAYER}.{expert}.{projection}.{suffix}": tensor
        for expert in range(len(WIDTHS))
        for projection in SHAPES
        for suffix, tensor in tensors_of(expert, projection, factor)[0].items()
    }
    save_file({**tensors, "lm_head.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def refusal(folder: Path, name: str, value: torch.Tensor | None) -> str:
    """Return what is said of a checkpoint one of whose tensors is another, or gone."""
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        verify(folder)
    return str(error.value)


def test_sizes_are_the_schemes_and_exact(checkpoint: Path) -> None:
    summary = verify(checkpoint)
    expected = sum(
        (GRID if expert else ROWS).nbytes(*SHAPES[projection], WIDTHS[expert], GROUP)
        for expert in range(len(WIDTHS))
        for projection in SHAPES
    )
    with ShardSet(checkpoint) as shards:
        stored = sum(info.nbytes for name, info in shards.tensors.items() if name.startswith(LAYER))
    assert summary.expert_bytes == expected == stored
    assert summary.other_bytes == 64
    assert ROWS.nbytes(3, 32, 8, -1) == 3 * 32 + 3 * 2


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_the_grids_bytes_are_those_of_the_format(group_size: int) -> None:
    for bits in GRID.widths:
        groups = 1 if group_size == -1 else 256 // group_size
        assert GRID.nbytes(48, 256, bits, group_size) == 48 * 256 * bits // 8 + 48 * groups * 4


def test_matrices_are_dequantized(checkpoint: Path) -> None:
    with ShardSet(checkpoint) as shards:
        for matrix in expert_matrices(shards, load_config(checkpoint)):
            assert matrix.scheme is (GRID if matrix.expert else ROWS)
            assert torch.equal(matrix.dequantize(shards), tensors_of(matrix.expert, matrix.projection)[1])


@pytest.mark.parametrize(
    ("suffix", "value", "words"),
    [
        ("weight_step", None, "is missing"),
        ("weight_step", torch.full((INTERMEDIATE,), float("nan")).half(), "expected finite values"),
        ("weight_step", torch.ones(INTERMEDIATE), r"expected torch.float16 or torch.bfloat16 [96] for 8 bits"),
        ("weight_step", torch.ones(3).half(), "found torch.float16 [3]"),
        ("weight_bytes", torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8), "expected torch.uint8 [96, 64]"),
        ("weight_bytes", torch.zeros(INTERMEDIATE, 32, dtype=torch.uint8), "as in expert 0"),
        ("weight_packed", torch.zeros(2, 2), "belongs to no expert"),
    ],
)
def test_damage_is_named(checkpoint: Path, suffix: str, value: torch.Tensor | None, words: str) -> None:
    name = f"{LAYER}.0.gate.{suffix}"
    message = refusal(checkpoint, name, value)
    assert words in message
    assert name in message or words == "as in expert 0"


def test_a_width_that_the_scheme_does_not_have(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace("[8, 3, 8, 2]", "[2, 3, 8, 2]"))
    with pytest.raises(CheckpointError, match=r"0\.gate: expected one of 8 bits for the scheme byte rows, found 2"):
        verify(checkpoint)


class Rank:
    """One rank's buffers, filled by the vLLM adapter's loader."""

    def __init__(self, config: MoeqConfig, ranks: int, rank: int, experts: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        share = INTERMEDIATE // ranks
        self.rows = slice(rank * share, (rank + 1) * share)
        self.partition = Partition(LAYER, config, WIDTHS, experts, HIDDEN, share, rank)
        self.loader = ExpertLoader(self.partition)
        self.layouts = {"w13": self.partition.w13, "w2": self.partition.w2}
        self.parameters = {
            (part, suffix): torch.nn.Parameter(layout.empty(suffix), requires_grad=False)
            for part, layout in self.layouts.items()
            for suffix in layout.suffixes
        }

    def load(self, expert: int, projection: str, suffix: str, tensor: torch.Tensor) -> None:
        part = "w2" if projection == "down" else "w13"
        parameter = self.parameters.get((part, suffix), torch.nn.Parameter(torch.empty(0)))
        self.loader.loader_for(suffix)(parameter, tensor, "", SHARDS[projection], expert)

    def load_all(self, shards: ShardSet) -> None:
        for name in shards.tensors:
            if name.startswith(LAYER):
                expert, projection, suffix = name.removeprefix(f"{LAYER}.").split(".")
                self.load(int(expert), projection, suffix, shards.load(name))
        self.loader.check_complete()

    def packed(self) -> PackedExperts:
        gate_up, down = map(self._matrices, self.layouts)
        return PackedExperts(gate_up, down)

    def _matrices(self, part: str) -> PackedMatrices:
        layout = self.layouts[part]
        buffers = of_one_dtype({suffix: self.parameters[part, suffix].data for suffix in layout.suffixes})
        return PackedMatrices(layout, *buffers.values())


@pytest.mark.parametrize(("ranks", "experts"), [(1, (0, 1, 2, 3)), (3, (0, 1, 2, 3)), (1, (2, 0)), (1, (0,))])
@pytest.mark.parametrize("factor", [1.0, 2.0**-30])
def test_the_loader_of_the_vllm_adapter(tmp_path: Path, ranks: int, experts: tuple[int, ...], factor: float) -> None:
    """Steps that float16 cannot hold are widened, whatever the scheme."""
    folder = make_checkpoint(tmp_path / "checkpoint", factor)
    for number in range(ranks):
        rank = Rank(load_config(folder), ranks, number, experts)
        with ShardSet(folder) as shards:
            rank.load_all(shards)
        packed = rank.packed()
        for local, expert in enumerate(experts):
            gate, up = packed.gate_up.dense(local, torch.float32).chunk(2)
            assert torch.equal(gate, tensors_of(expert, "gate", factor)[1][rank.rows])
            assert torch.equal(up, tensors_of(expert, "up", factor)[1][rank.rows])
            down = packed.down.dense(local, torch.float32)
            assert torch.equal(down, tensors_of(expert, "down", factor)[1][:, rank.rows])


def test_a_missing_tensor_and_a_strangers(checkpoint: Path) -> None:
    rank = Rank(load_config(checkpoint), 1, 0)
    with pytest.raises(CheckpointError, match=r"0\.gate\.weight_bytes was not loaded"):
        rank.loader.check_complete()
    with pytest.raises(CheckpointError, match=r"0\.gate\.weight_scale belongs to no expert"):
        rank.load(0, "gate", "weight_scale", torch.ones(INTERMEDIATE, 2).half())
    with pytest.raises(CheckpointError, match=r"0\.gate\.weight_bytes: unexpected torch\.int8"):
        rank.load(0, "gate", "weight_bytes", torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8))


def test_a_rank_is_cut_where_all_its_schemes_can_be(checkpoint: Path) -> None:
    """48 columns are three steps of 16, which bytes want, and no multiple of the grid's 32."""
    config = load_config(checkpoint)
    assert Partition(LAYER, config, WIDTHS, (0,), HIDDEN, 48, 0).w2.columns == 48
    with pytest.raises(UsageError, match="an intermediate size in multiples of 32, found 48"):
        _ = Partition(LAYER, config, WIDTHS, (0, 1), HIDDEN, 48, 0).w2


def test_the_transformers_adapter(checkpoint: Path) -> None:
    pytest.importorskip("transformers")
    from vllm_moeq.hf.layout import read_layers
    from vllm_moeq.hf.linears import conversions
    from vllm_moeq.hf.packed import PackedStorage

    config = load_config(checkpoint)
    with ShardSet(checkpoint) as shards:
        (layer,) = read_layers(shards, config)
        storage = PackedStorage(layer)
        storage.load(shards)
    storage.to(torch.float64)
    for expert in range(len(WIDTHS)):
        gate, up = storage.packed("gate_up").dense(expert, torch.float32).chunk(2)
        assert torch.equal(gate, tensors_of(expert, "gate")[1])
        assert torch.equal(up, tensors_of(expert, "up")[1])
        assert torch.equal(storage.packed("down").dense(expert, torch.float32), tensors_of(expert, "down")[1])
    assert "weight_bytes" in str(conversions(config, {})[0].source_patterns)


def loaded(checkpoint: Path, experts: tuple[int, ...] = (0, 1, 2, 3)) -> PackedExperts:
    rank = Rank(load_config(checkpoint), 1, 0, experts)
    with ShardSet(checkpoint) as shards:
        rank.load_all(shards)
    return rank.packed()


@pytest.mark.parametrize("backend", [row.name for row in TABLE if row.schemes is not None])
def test_a_kernel_that_does_not_take_the_scheme(
    checkpoint: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moeq.kernels.humming.available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        UsageError, match=f"the {backend} kernel takes experts of the scheme grid( or trellis)?, found byte rows"
    ):
        choose(loaded(checkpoint), backend)
    assert choose(loaded(checkpoint, (1, 2, 3))).backend


@pytest.mark.parametrize("compiled", [False, True])
def test_the_reference_takes_every_scheme(checkpoint: Path, compiled: bool) -> None:
    packed = loaded(checkpoint)
    assert choose(packed).backend == "reference"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((8, HIDDEN), generator=generator) / 1000
    ids = torch.arange(len(WIDTHS)).repeat(2)[:, None]
    layer = make_layer(packed, x.dtype)
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    found = run(x, torch.ones(8, 1), ids)
    for row, expert in enumerate(ids[:, 0].tolist()):
        gate, up, down = (tensors_of(expert, projection)[1].double() for projection in SHAPES)
        inner = torch.nn.functional.silu(gate @ x[row].double()) * (up @ x[row].double())
        torch.testing.assert_close(found[row].double(), down @ inner, rtol=1e-3, atol=1e-3)
