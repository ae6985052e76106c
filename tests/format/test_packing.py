from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moeq.format import BIT_WIDTHS, dequantize, pack, packed_words, unpack

EXAMPLES = settings(deadline=None, max_examples=60)
widths = st.sampled_from(BIT_WIDTHS)


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def packed_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """The layout as documented: bit j of code i is bit (i·b + j) mod 32 of word (i·b + j) // 32."""
    words = [0] * (len(codes) * bits // 32)
    for i, code in enumerate(codes):
        for j in range(bits):
            word, bit = divmod(i * bits + j, 32)
            words[word] |= (code >> j & 1) << bit
    return [word - 2**32 if word >= 2**31 else word for word in words]


@EXAMPLES
@given(bits=widths, rows=st.integers(0, 5), blocks=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(bits: int, rows: int, blocks: int, seed: int) -> None:
    codes = random_codes(bits, rows, 32 * blocks, seed=seed)
    assert torch.equal(unpack(pack(codes, bits), bits, 32 * blocks), codes)


@EXAMPLES
@given(data=st.data(), bits=widths, blocks=st.integers(1, 3))
def test_layout_is_the_documented_bitstream(data: st.DataObject, bits: int, blocks: int) -> None:
    size = 32 * blocks
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size))
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [packed_bit_by_bit(codes, bits)]


@EXAMPLES
@given(bits=widths, data=st.data())
def test_every_word_pattern_is_a_code_pattern(bits: int, data: st.DataObject) -> None:
    words = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=bits, max_size=bits))
    packed = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack(unpack(packed, bits, 32), bits), packed)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("shape", [(0, 64), (1, 32), (3, 0), (7, 96), (2, 3, 160)])
def test_shapes_survive(bits: int, shape: tuple[int, ...]) -> None:
    packed = pack(random_codes(bits, *shape), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 32)
    assert unpack(packed, bits, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_32_codes_are_as_many_words_as_bits(bits: int) -> None:
    assert packed_words(32, bits) == bits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype: torch.dtype) -> None:
    codes = random_codes(3, 2, 64)
    assert torch.equal(pack(codes.to(dtype), 3), pack(codes, 3))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("beyond", ["below", "above"])
def test_pack_refuses_codes_out_of_range(bits: int, beyond: str) -> None:
    codes = torch.zeros(1, 32, dtype=torch.int64)
    codes[0, 17] = -1 if beyond == "below" else 2**bits
    with pytest.raises(ValueError, match=r"must lie in \[0, "):
        pack(codes, bits)


@pytest.mark.parametrize("columns", [1, 31, 33, 48])
def test_pack_refuses_a_partial_block(columns: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(torch.zeros(2, columns, dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 16, -1])
def test_pack_refuses_unknown_widths(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        pack(torch.zeros(1, 32, dtype=torch.uint8), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pack_refuses_floats(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="integer"):
        pack(torch.full((1, 32), 0.5, dtype=dtype), 3)


@pytest.mark.parametrize("words", [2, 4])
def test_unpack_refuses_another_number_of_words(words: int) -> None:
    with pytest.raises(ValueError, match="3 int32 words"):
        unpack(torch.zeros(1, words, dtype=torch.int32), 3, 32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_unpack_refuses_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="3 int32 words"):
        unpack(torch.zeros(1, 3, dtype=dtype), 3, 32)


def test_unpack_refuses_unknown_widths() -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        unpack(torch.zeros(1, 5, dtype=torch.int32), 5, 32)


@EXAMPLES
@given(
    bits=widths,
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_dequantize_is_the_formula(bits: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(bits, 3, 32 * groups, seed=seed)
    scales = torch.rand(3, groups, generator=generator).add(0.01).to(dtype)
    zeros = (torch.rand(3, groups, generator=generator) * 2**bits).to(dtype)
    wide_scales = scales.double().repeat_interleave(32, dim=1)
    wide_zeros = zeros.double().repeat_interleave(32, dim=1)
    exact = (codes.double() - wide_zeros) * wide_scales
    torch.testing.assert_close(dequantize(codes, scales, zeros).double(), exact, rtol=2e-7, atol=1e-7)


def test_dequantize_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="do not match"):
        dequantize(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 3), torch.zeros(2, 3))


def test_dequantize_refuses_scales_of_other_rows() -> None:
    with pytest.raises(ValueError, match="do not match"):
        dequantize(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(3, 2), torch.zeros(3, 2))
