"""Moments of rotated inputs: right, and without a second set of tensors as large as the first."""

from __future__ import annotations

import torch

from planner.quantization.quantizers.rotated import AT_A_TIME, Basis
from vllm_moeq.format import rotate

COLUMNS, SIZE = AT_A_TIME + 64, 64


def test_moments_are_those_of_rotated_inputs_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 900, COLUMNS, generator=generator)
    others = torch.randn(2, 900, COLUMNS, generator=generator)
    signs = torch.randint(0, 2, (COLUMNS,), generator=generator).float() * 2 - 1
    turned = rotate(inputs, signs, SIZE)
    for left in (inputs, others):  # the second ones are no symmetric matrices
        moments = left.mT @ inputs / 900
        found = Basis(signs, SIZE).moments(moments)
        torch.testing.assert_close(found, rotate(left, signs, SIZE).mT @ turned / 900, rtol=0, atol=1e-5)
        assert found.data_ptr() == moments.data_ptr()
