"""Four-bit floats (e2m1) of MXFP4 and NVFP4, two in a byte."""

from __future__ import annotations

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the eight codes without the sign bit stand for."""

PER_BYTE = 2


def fp4_values(stored: torch.Tensor) -> torch.Tensor:
    """Return the values of bytes as float32, the lower half of a byte first.

    Args:
        stored: uint8 or int8 [rows, bytes].
    """
    table = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)])
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=1)  # byte → two values
    return pairs[stored.contiguous().view(torch.uint8).int()].flatten(-2)
