"""The best codes of a trellis for given weights (Viterbi, 1967): the native library's search, and the same in torch.

docs/format.md defines states and codes. Here a state's index has its oldest bits on top, so that the states that lead
to one state are a constant distance apart.
"""

from __future__ import annotations

from functools import cache

import torch

from vllm_moeq.format import STATE_BITS, TILE, codes_of_states
from vllm_moeq.kernels.cpu.encode import native_encode

STATES = 1 << STATE_BITS
WEIGHTS = TILE * TILE
WARM_UP = 64
"""Weights on either side of a tile's beginning that decide the state there."""
WORST = 65535
"""The largest squared error of a way to a state, in quarters of a squared code; larger ones count as this."""
TILES_AT_ONCE = 512
"""Tiles that torch searches together. They take some 150 MiB."""


@cache
def codes_by_age(bits: int) -> torch.Tensor:
    """Return the code of each state, int32 [4096], by the index with the oldest bits on top; not to be changed."""
    index = torch.arange(STATES)
    state = torch.zeros_like(index)
    for field in range(STATE_BITS // bits):
        state |= (index >> (field * bits) & ((1 << bits) - 1)) << (STATE_BITS - bits * (field + 1))
    return codes_of_states()[state].int()


def best_bits(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bits that each weight adds to its tile's ring, so that codes come close to the weights.

    A first search over the 128 weights around a tile's beginning finds the state there. The second search begins and
    ends with it.

    Args:
        weights: float32 [tiles, 256] in units of codes, in the order of the ring.
        bits: bits per weight, 1 to 4.

    Returns:
        uint8 [tiles, 256] with values below 2**bits, the same on every device.
    """
    if weights.device.type == "cpu":
        found = native_encode(weights, codes_by_age(bits), bits)
        if found is not None:
            return found
    parts = [encode(part, bits) for part in weights.split(TILES_AT_ONCE)]
    return torch.cat(parts) if parts else weights.new_empty(weights.shape, dtype=torch.uint8)


def encode(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what :func:`best_bits` returns, computed by torch on the weights' device."""
    halves = (weights.float() * 2 + 0.5).nan_to_num(0.0).clamp(0, 254).int()
    turned = torch.cat((halves[:, -WARM_UP:], halves[:, :WARM_UP]), dim=1)
    free = halves.new_zeros(halves.shape[0], STATES)
    middle = _states(turned, free, None, bits)[:, WARM_UP - 1]
    fixed = torch.full_like(free, WORST).scatter_(1, middle[:, None], 0)
    return (_states(halves, fixed, middle, bits) & ((1 << bits) - 1)).to(torch.uint8)


def _states(weights: torch.Tensor, costs: torch.Tensor, last: torch.Tensor | None, bits: int) -> torch.Tensor:
    """Return the best states, int64 [tiles, weights].

    Args:
        weights: int32 [tiles, weights], in halves of codes.
        costs: the cost of each state before the first weight, int32 [tiles, 4096].
        last: the state behind the last weight, int64 [tiles]; None chooses the best.
        bits: bits per weight.
    """
    ways, rest = 1 << bits, STATES >> bits
    codes = codes_by_age(bits).to(weights.device) * 2
    way = torch.arange(ways, device=weights.device, dtype=torch.int32)[:, None]
    chosen = []
    for column in range(weights.shape[1]):
        # The least of cost · ways + way is the least cost, and the lowest way where several have it.
        best = (costs.view(-1, ways, rest) * ways + way).amin(dim=1)
        chosen.append((best % ways).to(torch.uint8))
        best = best // ways
        best -= best.amin(dim=1, keepdim=True)
        error = (codes - weights[:, column, None]).square()
        costs = (best.repeat_interleave(ways, dim=1) + error).clamp_max(WORST)
    state = (costs.long() * STATES + torch.arange(STATES, device=costs.device)).amin(dim=1) % STATES
    state = state if last is None else last
    states = []
    for before in reversed(chosen):
        states.append(state)
        remaining = state >> bits
        state = before.gather(1, remaining[:, None])[:, 0].long() * rest + remaining
    return torch.stack(states[::-1], dim=1)
