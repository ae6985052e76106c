"""The rotation is what docs/format.md says, and its own inverse backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moeq.format import BlockRotation, Rotated, pack_signs, rotate, rotation_size, unpack_signs, unrotate
from vllm_moeq.format.rotation import ROTATION_SIZES


def signs_of(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (columns,), generator=generator).float() * 2 - 1


@given(st.integers(1, 9), st.integers(0, 1 << 20))
def test_signs_survive_packing(blocks: int, seed: int) -> None:
    signs = signs_of(32 * blocks, seed)
    words = pack_signs(signs)
    assert torch.equal(unpack_signs(words), signs)
    for place, sign in enumerate(signs.tolist()):
        assert (int(words[place // 32]) >> place % 32 & 1) == (sign < 0)


@pytest.mark.parametrize("size", ROTATION_SIZES)
def test_every_entry_is_the_formats(size: int) -> None:
    signs = signs_of(2 * size, size)
    found = rotate(torch.eye(2 * size), signs, size).T
    for block in (0, 1):
        for i in range(size):
            for j in range(0, size, 7):
                expected = (-1) ** (i & j).bit_count() / size**0.5 * float(signs[block * size + j])
                assert float(found[block * size + i, block * size + j]) == pytest.approx(expected, abs=1e-6)
    assert not bool(found[:size, size:].any())


@pytest.mark.parametrize("size", ROTATION_SIZES)
def test_products_stay(size: int) -> None:
    signs = signs_of(512, 1)
    x, weights = torch.randn(3, 512), torch.randn(5, 512)
    stored = rotate(weights, signs, size)
    torch.testing.assert_close(stored @ rotate(x, signs, size).T, weights @ x.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(unrotate(stored, signs, size), weights)
    torch.testing.assert_close(Rotated("name", size).undo(stored, pack_signs(signs)), weights)


def test_a_kernels_input_is_rounded_once() -> None:
    signs, x = signs_of(128, 2), torch.randn(4, 128).bfloat16()
    found = BlockRotation(pack_signs(signs), 64)(x)
    assert torch.equal(found, rotate(x, signs, 64).bfloat16())


@pytest.mark.parametrize(("columns", "size"), [(4096, 128), (2880, 64), (768, 128), (96, 32), (48, 16), (40, None)])
def test_the_size_is_the_largest_that_divides(columns: int, size: int | None) -> None:
    assert rotation_size(columns) == size
