"""Layers in a rotated basis, and parts of layers on ranks, for the tests of every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_moeq.format import BlockRotation
from vllm_moeq.kernels import PackedExperts, PackedMatrices, ragged


class Rotations(NamedTuple):
    """The rotations of a layer's input, and of what its down projections take."""

    before_up: BlockRotation | None = None
    before_down: BlockRotation | None = None


def random_rotation(columns: int, size: int) -> BlockRotation:
    words = torch.randint(-(2**31), 2**31, (columns // 32,), generator=torch.Generator().manual_seed(columns + size))
    return BlockRotation(words.int(), size)


def turned(packed: PackedExperts, rotations: Rotations) -> PackedExperts:
    """Return a layer as if it were stored in a rotated basis."""
    both = ((packed.gate_up, rotations.before_up), (packed.down, rotations.before_down))
    gate_up, down = (
        PackedMatrices(it.matrices, *it.tensors.values(), rotation=rotation, bias=it.bias) for it, rotation in both
    )
    return PackedExperts(gate_up, down, packed.activation)


def rotated(x: torch.Tensor, rotation: BlockRotation | None) -> torch.Tensor:
    """Multiply by the matrix that the format defines, entry by entry."""
    if rotation is None:
        return x.double()
    signs = [-1.0 if int(word) >> j & 1 else 1.0 for word in rotation.signs for j in range(32)]
    size = range(rotation.size)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in size] for i in size], dtype=torch.float64)
    blocks = (x.double() * torch.tensor(signs, dtype=torch.float64)).unflatten(-1, (-1, rotation.size))
    return (blocks @ (matrix / rotation.size**0.5).T).flatten(-2)


def rank_s_part(
    part: PackedMatrices, rows: list[tuple[int, int]] | None, columns: tuple[int, int] | None
) -> PackedMatrices:
    """Cut spans of rows, or a span of columns, out of every expert as a loader does."""
    whole, lists = part.matrices, dict[str, list[torch.Tensor]]()
    for expert, (scheme, bits) in enumerate(zip(whole.schemes, whole.bits, strict=True)):
        for suffix in scheme.suffixes:
            tensor = whole.view(part.tensors[suffix], suffix, expert)
            spans: list[tuple[int, int] | None] = [*rows] if rows else [None]
            cuts = [scheme.cut(suffix, bits, whole.group_size, rows=span, columns=columns) for span in spans]
            found = torch.cat([tensor[cut] for cut in cuts])
            lists.setdefault(suffix, []).append(found.flatten() if suffix == scheme.codes else found)
    own = ragged(
        whole.bits,
        sum(end - begin for begin, end in rows) if rows else whole.rows,
        columns[1] - columns[0] if columns else whole.columns,
        whole.group_size,
        columns[0] % whole.group_size if columns else 0,
        whole.schemes,
    )
    codes = {scheme.codes for scheme in whole.schemes}
    tensors = ((torch.cat if suffix in codes else torch.stack)(lists[suffix]) for suffix in own.suffixes)
    return PackedMatrices(own, *tensors)
