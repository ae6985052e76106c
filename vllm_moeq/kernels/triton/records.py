"""What a program of ``few_tokens`` must know, looked up once for both projections in the launch before them.

Otherwise each program would wait for the expert of its pair, then for the expert's row of the table, and then for the
first weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PARTS, EXPERT, ENTRIES, FIXED = (tl.constexpr(place) for place in (0, 1, 2, 8))
"""Where a record has the parts of down's inputs, the expert, its rows of gate and up's table and of down's, and what
comes before its pairs."""


@dataclass(frozen=True)
class Lookup:
    """What the records of a call are made of.

    Attributes:
        ids: local expert indices, int32 [pairs].
        up: the table of gate and up, int32 [E, 3].
        down: the table of down.
        splits: the parts of the input dimension of each expert's down, int32 [E].
        records: the records, int32 [pairs, FIXED + tokens], written.
        top_k: pairs per token.
        tokens: tokens of one expert per program, at least as many as the call has.
    """

    ids: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    splits: torch.Tensor
    records: torch.Tensor
    top_k: int
    tokens: int

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """The arguments that a kernel passes on to :func:`look_up`."""
        return self.ids, self.ids.numel(), self.up, self.down, self.splits, self.records

    @property
    def constants(self) -> dict[str, int]:
        """The compile-time parameters of a kernel that calls :func:`look_up`."""
        return {"TOKENS": self.tokens, "PAIRS": triton.next_power_of_2(self.tokens * self.top_k), "TOP_K": self.top_k}


NO_ARGUMENTS = (None, 0, None, None, None, None)
NO_CONSTANTS = {"TOKENS": 0, "PAIRS": 0, "TOP_K": 0}
"""Those of a launch that looks nothing up."""


@triton.jit
def look_up(ids, pairs, pair, up, down, splits, records, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """Store a pair's record: parts, expert, coding, first word and first scale of both projections, pairs [TOKENS].

    An expert's first pair works for its first TOKENS pairs, and if a token names an expert twice, the pair behind those
    for the next ones. All others have the coding −1, as those without a local expert. So have unused places of pairs.
    """
    expert = tl.load(ids + pair)
    index = tl.arange(0, PAIRS)
    same = (tl.load(ids + index, mask=index < pairs, other=-1) == expert) & (expert >= 0)
    local = tl.maximum(expert, 0)
    record = records + pair * (FIXED + TOKENS)
    own = tl.sum((same & (index < pair)).to(tl.int32), axis=0)
    works = (expert >= 0) & (own % TOKENS == 0)
    tl.store(record + PARTS, tl.load(splits + local))
    tl.store(record + EXPERT, local)
    for side in tl.static_range(2):
        entry = (down if side else up) + local * 3
        tl.store(record + ENTRIES + 3 * side, tl.where(works, tl.load(entry), -1))
        tl.store(record + ENTRIES + 3 * side + 1, tl.load(entry + 1))
        tl.store(record + ENTRIES + 3 * side + 2, tl.load(entry + 2))
    slot = tl.arange(0, TOKENS)
    rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
    chosen = same[None, :] & (rank[None, :] == own + slot[:, None])
    tl.store(record + FIXED + slot, tl.max(tl.where(chosen, index[None, :], -1), axis=1))
