"""Scales in every dtype that files have, and which weights share one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from planner.model.codecs.codec import UnreadableError
from planner.model.codecs.encoding import Stored

SCALE = "scale"

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
"""Dtypes of powers of two, which have no more than an exponent; older files store it as an integer."""


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; an exponent e stands for 2^(e − 127), and 255 for no number."""
    if stored.dtype not in EXPONENTS:
        return stored.float()
    exponents = stored.contiguous().view(torch.uint8).int()
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)  # 2^-127 has no leading one in float32
    return bits.int().view(torch.float32)


def finite(scales: torch.Tensor, role: str) -> torch.Tensor:
    """Return scales unchanged.

    Raises:
        UnreadableError: one is NaN or infinite.
    """
    if not bool(torch.isfinite(scales).all()):
        raise UnreadableError(role, "finite scales", "NaN or infinity")
    return scales


def block_of(
    shape: tuple[int, int], scales: tuple[int, ...], blocks: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """Return how many rows and columns of a matrix share a scale, or None if the scales do not fit.

    Args:
        shape: the matrix' rows and columns.
        scales: shape of its scales: for all of it, per row or column, per group of a row's weights, or per block.
        blocks: sizes of blocks that the source names. The last block of a row or column may be cut off.
    """
    rows, columns = shape
    if len(scales) < 2:
        return (rows, columns) if scales in ((), (1,)) else (1, columns) if scales[0] == rows else None
    if len(scales) == 4 and scales[1] == scales[3] == 1:  # as modelopt stores those of blocks
        return block_of(shape, (scales[0], scales[2]), blocks)
    if len(scales) > 2:
        return None
    for block in blocks:
        if scales == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    if scales[0] == rows and columns % scales[1] == 0:
        return 1, columns // scales[1]
    return {(1, columns): (rows, 1), (1, 1): None if blocks else (rows, columns)}.get((scales[0], scales[1]))


def single(stored: Stored, role: str, stack: Sequence[int]) -> bool:
    """Tell whether a tensor of one number per matrix has one for all matrices of a stack.

    Raises:
        CheckpointError: it has another number of them, or another dtype than a float.
    """
    info = stored.info(role)
    if info.dtype not in FLOATS or (info.numel != 1 and [info.numel, *info.shape[:1]] != [*stack, *stack]):
        stored.refuse(role, f"one float{f', or one for each of {stack[0]} matrices' if stack else ''}")
    return info.numel == 1
