"""Integer codes in 32-bit words, and the groups of columns that share a scale."""

from __future__ import annotations

import torch

from planner.model.codecs.codec import UnreadableError
from vllm_moeq.format import CODES_PER_BLOCK, unpack

G_IDX = "g_idx"


def codes_of(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` codes of words along the last dimension, which are a continuous stream of bits."""
    blocks = -(-count // CODES_PER_BLOCK)
    padded = torch.nn.functional.pad(words, (0, blocks * bits - words.shape[-1]))
    return unpack(padded.contiguous(), bits, blocks * CODES_PER_BLOCK)[..., :count]


def codes_between(words: torch.Tensor, bits: int, first: int, last: int, step: int) -> torch.Tensor:
    """Return the codes ``first``, ``first + step``, … below ``last``; only the words around them are unpacked."""
    block = first // CODES_PER_BLOCK
    around = words[..., block * bits : -(-last // CODES_PER_BLOCK) * bits]
    begin = block * CODES_PER_BLOCK
    return codes_of(around, bits, last - begin)[..., first - begin :: step]


def column_groups(stored: torch.Tensor | None, columns: int, groups: int) -> torch.Tensor:
    """Return the group of every column: what the file says, else groups of equal size one behind the other.

    Raises:
        UnreadableError: the file names a group that does not exist.
    """
    if stored is None:
        return torch.arange(columns) // (columns // groups)
    index = stored.long()
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise UnreadableError(G_IDX, f"groups from 0 to {groups - 1}", f"{int(index.min())} to {int(index.max())}")
    return index
