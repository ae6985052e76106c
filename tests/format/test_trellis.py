"""The trellis: packing and decoding agree with a slow reading of docs/format.md, and bad tensors are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_moeq.format import (
    ROW_SCALE,
    TRELLIS,
    TRELLIS_SCHEME,
    CheckpointError,
    ExpertMatrix,
    ShardSet,
    codes_of_states,
    pack_trellis,
    trellis_codes,
    trellis_states,
)

EXAMPLES = settings(deadline=None, max_examples=60)
WIDTHS = st.sampled_from(TRELLIS_SCHEME.widths)
SIZES = st.tuples(st.integers(1, 3).map(lambda n: 16 * n), st.integers(1, 3).map(lambda n: 32 * n))


def random_bits(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    """Return each weight's own bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def slow_state(words: list[list[int]], bits: int, row: int, column: int) -> int:
    """Return one weight's state from the words of a file, bit by bit as the specification says."""

    def stream_bit(position: int) -> int:
        tile_row, within = divmod(position % (256 * bits), 16 * bits)
        p = 16 * bits * (column // 16) + within
        return (words[row // 16 * 16 + tile_row][p // 32] >> (p % 32)) & 1

    index = 16 * (row % 16) + column % 16
    return sum(stream_bit((index + 1) * bits - 12 + j) << j for j in range(12))


def slow_code(state: int) -> int:
    return sum((state * 0x83DCD12D % (1 << 32)).to_bytes(4, "little")) >> 3


@EXAMPLES
@given(sizes=SIZES, bits=WIDTHS, seed=st.integers(0, 1 << 30))
def test_decoding_is_what_the_specification_says(sizes: tuple[int, int], bits: int, seed: int) -> None:
    own = random_bits(*sizes, bits, seed)
    packed = pack_trellis(own, bits)
    words = packed.tolist()
    expected = [[slow_state(words, bits, row, column) for column in range(sizes[1])] for row in range(sizes[0])]
    assert packed.shape == (sizes[0], sizes[1] * bits // 32)
    assert trellis_states(packed, bits).tolist() == expected
    assert torch.equal(trellis_states(packed, bits) >> (12 - bits), own)
    codes = trellis_codes(packed, bits)
    assert codes.tolist() == [[slow_code(state) for state in row] for row in expected]

    scales = (torch.rand(sizes[0], generator=torch.Generator().manual_seed(seed)) + 0.1).half()
    weights = TRELLIS_SCHEME.dequantize({TRELLIS: packed, ROW_SCALE: scales}, bits, 128)
    torch.testing.assert_close(weights.double(), (codes.double() - 63.25) * scales.double()[:, None])


def test_codes_are_spread_like_weights() -> None:
    codes = codes_of_states()
    assert codes.shape == (4096,)
    assert codes.tolist() == [slow_code(state) for state in range(4096)]
    assert 0 <= int(codes.min()) <= int(codes.max()) <= 127
    assert abs(float(codes.float().mean()) - 63.25) < 0.5


@EXAMPLES
@given(bits=WIDTHS, seed=st.integers(0, 1 << 30), cut=st.integers(1, 3))
def test_a_ranks_part_decodes_alone(bits: int, seed: int, cut: int) -> None:
    words = pack_trellis(random_bits(64, 128, bits, seed), bits)
    tensors = {TRELLIS: words, ROW_SCALE: torch.linspace(0.5, 1, 64).half()}
    whole = TRELLIS_SCHEME.dequantize(tensors, bits, -1)
    for rows, columns in [((16 * cut, 64), None), (None, (32 * cut, 128)), ((0, 16 * cut), (0, 32 * cut))]:
        part = {
            name: tensor[TRELLIS_SCHEME.cut(name, bits, -1, rows=rows, columns=columns)]
            for name, tensor in tensors.items()
        }
        layout = TRELLIS_SCHEME.layout(part[TRELLIS].shape[0], part[TRELLIS].shape[1] * 32 // bits, bits, -1)
        assert {name: tensor.shape for name, tensor in layout.items()} == {n: tuple(t.shape) for n, t in part.items()}
        expected = whole[slice(*(rows or (0, 64))), slice(*(columns or (0, 128)))]
        assert torch.equal(TRELLIS_SCHEME.dequantize(part, bits, -1), expected)


def test_it_takes_the_width_and_two_bytes_per_row() -> None:
    for bits in TRELLIS_SCHEME.widths:
        assert TRELLIS_SCHEME.nbytes(48, 256, bits, 128) == 48 * 256 * bits // 8 + 48 * 2


@pytest.mark.parametrize(
    ("shape", "bits", "words"),
    [
        ((16, 32), 8, "one of"),
        ((8, 32), 2, "multiple of 16 rows"),
        ((16, 48), 2, "32 columns"),
        ((16, 32), 0, "one of"),
    ],
)
def test_what_fills_no_tiles_is_not_packed(shape: tuple[int, int], bits: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_trellis(torch.zeros(shape, dtype=torch.uint8), bits)


def test_bits_out_of_range_are_not_packed() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        pack_trellis(torch.full((16, 32), 4, dtype=torch.uint8), 2)


WORDS = torch.zeros(32, 6, dtype=torch.int32)
SCALES = torch.ones(32).half()


def read(folder: Path, bits: int, tensors: dict[str, torch.Tensor]) -> ExpertMatrix:
    save_file({f"experts.0.gate.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with ShardSet(folder) as shards:
        return TRELLIS_SCHEME.read_matrix(shards, "experts", 0, "gate", bits, 128)


@pytest.mark.parametrize(("bits", "columns"), [(1, 192), (2, 96), (3, 64)])
def test_the_shape_is_read_from_the_words(tmp_path: Path, bits: int, columns: int) -> None:
    matrix = read(tmp_path, bits, {TRELLIS: WORDS, ROW_SCALE: SCALES})
    assert (matrix.rows, matrix.columns) == (32, columns)
    assert matrix.nbytes == WORDS.nbytes + SCALES.nbytes


@pytest.mark.parametrize(
    ("name", "value", "bits", "words"),
    [
        (TRELLIS, None, 2, "weight_trellis is missing"),
        (ROW_SCALE, None, 2, "weight_row_scale is missing"),
        (TRELLIS, WORDS, 8, "expected one of 1, 2, 3, 4 bits for the scheme trellis, found 8"),
        (TRELLIS, WORDS, 4, "expected a multiple of 16 rows and of 4 words for 4 bits, found [32, 6]"),
        (TRELLIS, WORDS[:24], 2, "found [24, 6]"),
        (TRELLIS, WORDS.long(), 2, "expected a 2-D int32 tensor, found torch.int64"),
        (TRELLIS, WORDS[0], 2, "expected a 2-D int32 tensor, found torch.int32 [6]"),
        (ROW_SCALE, SCALES[:16], 2, "expected torch.float16 or torch.bfloat16 [32] for 2 bits, found"),
        (ROW_SCALE, SCALES.float(), 2, "found torch.float32 [32]"),
        (ROW_SCALE, SCALES[:, None], 2, "found torch.float16 [32, 1]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, name: str, value: torch.Tensor | None, bits: int, words: str
) -> None:
    tensors = {TRELLIS: WORDS, ROW_SCALE: SCALES} | ({} if value is None else {name: value.contiguous()})
    if value is None:
        del tensors[name]
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, bits, tensors)
    assert words in str(error.value)
    assert "experts.0.gate" in str(error.value)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "finite"), (float("inf"), "finite"), (0.0, "scale of 0")])
def test_impossible_scales_are_refused(value: float, words: str) -> None:
    scales = SCALES.clone()
    scales[3] = value
    with pytest.raises(CheckpointError, match=f"here: expected .*{words}"):
        TRELLIS_SCHEME.check_values(scales, ROW_SCALE, "here")
