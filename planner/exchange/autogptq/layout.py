"""Convert the four tensors of one linear between AutoGPTQ's format and ours.

AutoGPTQ's tensors for a matrix [N, K] of b bits in groups of G, and their equivalents in our format:

    qweight  int32    [K·b/32, N]     our packed words [N, K·b/32], transposed
    qzeros   int32    [K/G, N·b/32]   integer zero points, packed along N
    scales   float16  [K/G, N]        our scales, transposed
    g_idx    int32    [K]             k // G

The file stores zero points unchanged (``gptq_v2``) or reduced by one (``gptq``).
"""

from __future__ import annotations

from typing import Literal

import torch

from vllm_moeq.format import PACKED, SCALE, ZERO, pack, unpack

QWEIGHT, QZEROS, SCALES, G_IDX = "qweight", "qzeros", "scales", "g_idx"
SUFFIXES = (QWEIGHT, QZEROS, SCALES, G_IDX)

WIDTHS = (2, 3, 4, 8)
"""Widths that both formats support."""

Version = Literal["v1", "v2"]
ZERO_STORAGE: dict[str, Version] = {"gptq": "v1", "gptq_v2": "v2"}
"""``checkpoint_format`` → storage of zero points."""


def group_index(columns: int, groups: int) -> torch.Tensor:
    """Return ``g_idx`` for contiguous groups, int32 [K]."""
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def encode(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, version: Version
) -> dict[str, torch.Tensor]:
    """Return AutoGPTQ's four tensors for a matrix of ours. N must be a multiple of 32.

    Args:
        words: packed codes, int32 [N, K·b/32].
        scales: [N, K/G], exact in float16.
        zeros: zero points [N, K/G], integers 0 … 2^b − 1 of any dtype; for ``v1``, 1 … 2^b − 1.
        bits: 2, 3, 4 or 8.
        version: storage of zero points.

    Raises:
        ValueError: a zero point that the version cannot hold.
    """
    stored = zeros.to(torch.int32).T - (1 if version == "v1" else 0)
    return {
        QWEIGHT: words.T.contiguous(),
        QZEROS: pack(stored, bits),
        SCALES: scales.to(torch.float16).T.contiguous(),
        G_IDX: group_index(words.shape[1] * 32 // bits, scales.shape[1]),
    }


def decode_zeros(qzeros: torch.Tensor, bits: int, rows: int, version: Version) -> torch.Tensor:
    """Return the zero points, uint8 [N, K/G].

    Args:
        qzeros: int32 [K/G, N·b/32].
        bits: 2, 3, 4 or 8.
        rows: N.
        version: storage of zero points.

    Raises:
        ValueError: a ``v1`` field has all bits set. It should mean zero point 0, but programs disagree: some borrow
            from the neighbouring field when they write it, some do not.
    """
    stored = unpack(qzeros, bits, rows)
    if version == "v1":
        if bool((stored == 2**bits - 1).any()):
            raise ValueError("a zero point of 0")
        stored = stored + 1
    return stored.T.contiguous()


def decode(qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return our three tensors for an expert matrix: packed codes, scales, and zero points in the scales' dtype.

    Args:
        qweight: packed codes, int32 [K·b/32, N].
        scales: float16 or bfloat16 [K/G, N].
        zeros: uint8 [N, K/G], from :func:`decode_zeros`.
    """
    return {
        PACKED: qweight.T.contiguous(),
        SCALE: scales.T.contiguous(),
        ZERO: zeros.to(scales.dtype),
    }
