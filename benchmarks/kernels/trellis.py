"""Layers of random trellises, plain and in a rotated basis, to time beside the grid's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.kernels.routing import Shape
from vllm_moeq.format import TRELLIS_SCHEME, TRELLIS_WIDTHS, BlockRotation
from vllm_moeq.kernels import PackedExperts, PackedMatrices, ragged
from vllm_moeq.kernels.cpu.layer import NativeLayer

SIZES = (128, 64, 32, 16)
DEVIATION = 18
"""The standard deviation of a trellis' codes."""


def random_matrices(bits: Sequence[int], rows: int, columns: int, seed: int) -> PackedMatrices:
    """Return random words, with weights of about variance 1/columns."""
    layout = ragged(bits, rows, columns, -1, schemes=[TRELLIS_SCHEME] * len(bits))
    generator = torch.Generator().manual_seed(seed)
    words = layout.empty(TRELLIS_SCHEME.codes).random_(-(2**31), 2**31, generator=generator)
    scales = (0.75 + 0.5 * torch.rand((len(bits), rows), generator=generator)) / DEVIATION / columns**0.5
    return PackedMatrices(layout, words, scales.half())


def beside(grid: PackedMatrices, bits: Sequence[int], seed: int) -> PackedMatrices:
    """Return trellises of some widths and, behind them, the experts of a grid, on the grid's device."""
    of = grid.matrices
    rings = random_matrices(bits, of.rows, of.columns, seed)
    layout = ragged(
        [*bits, *of.bits], of.rows, of.columns, of.group_size, schemes=[*rings.matrices.schemes, *of.schemes]
    )
    tensors = {name: tensor.to(grid.device) for name, tensor in (rings.tensors | grid.tensors).items()}
    return PackedMatrices(layout, *(tensors[suffix] for suffix in layout.suffixes))


def trellis_experts(bits: Sequence[int], shape: Shape, device: torch.device) -> PackedExperts:
    """Return a layer of random trellises."""

    def moved(rows: int, columns: int, seed: int) -> PackedMatrices:
        made = random_matrices(bits, rows, columns, seed)
        return PackedMatrices(made.matrices, *(tensor.to(device) for tensor in made.tensors.values()))

    return PackedExperts(moved(2 * shape.intermediate, shape.hidden, 1), moved(shape.hidden, shape.intermediate, 2))


def rotation(columns: int, seed: int) -> BlockRotation:
    """Return random signs with the largest of :data:`SIZES` that divides the columns."""
    size = next(size for size in SIZES if columns % size == 0)
    words = torch.randint(-(2**31), 2**31, (columns // 32,), generator=torch.Generator().manual_seed(seed))
    return BlockRotation(words.int(), size)


def trellis_layers(bits: Sequence[int], shape: Shape) -> dict[str, NativeLayer]:
    """Return a layer of trellises and the same in a rotated basis, by name; none if there is no such width."""
    if not set(bits) <= set(TRELLIS_WIDTHS):
        return {}
    up = random_matrices(bits, 2 * shape.intermediate, shape.hidden, 1)
    down = random_matrices(bits, shape.hidden, shape.intermediate, 2)
    turned = PackedExperts(
        PackedMatrices(up.matrices, *up.tensors.values(), rotation=rotation(shape.hidden, 3)),
        PackedMatrices(down.matrices, *down.tensors.values(), rotation=rotation(shape.intermediate, 4)),
    )
    return {"trellis": NativeLayer(PackedExperts(up, down)), "rotated": NativeLayer(turned)}
