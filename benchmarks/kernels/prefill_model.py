"""This script estimates two ways through a prompt from counts: decode weights for each tile of tokens, or once.

    python -m benchmarks.kernels.prefill_model [--tokens 4096]

Nothing here was timed. The first way is what ``many_tokens`` does: each tile of 64 tokens of an expert decodes the
expert's weights again. The second way decodes a layer to bfloat16 in memory and runs a grouped product of bfloat16
matrices, as vLLM's own kernel. Each launch takes as long as its slowest stream: of bytes, of instructions, or of the
tensor cores at their data sheet's rate; of launches only the one more that the second way has is counted.
"""

from __future__ import annotations

import argparse
import math

from benchmarks.kernels.routing import MODELS, Shape, activation_bytes, expert_bytes
from benchmarks.kernels.time_model import CARDS, INSTRUCTIONS, RINGS, Card
from vllm_moeq.kernels.triton.schedule import MANY

GROUP = 128
ITEM = 2
"""Bytes of a bfloat16 value."""


def per_tile_us(card: Card, coding: str, tokens: int, shape: Shape) -> float:
    """Return the microseconds of a layer whose tiles each decode their weights; tokens are spread evenly."""
    weights = 3 * shape.hidden * shape.intermediate
    share = tokens * shape.top_k / shape.experts
    tiles = math.ceil(share / MANY[-1].tokens)
    issued = shape.experts * tiles * weights * INSTRUCTIONS[coding][2]
    return 1e6 * max(
        (packed_bytes(coding, shape) + activation_bytes(tokens, shape)) / (card.bandwidth * 1e9),
        issued / card.issues,
        operations(tokens, shape) / (card.tensor * 1e12),
    )


def once_us(card: Card, coding: str, tokens: int, shape: Shape) -> float:
    """Return the microseconds of a layer that is decoded to bfloat16 first; decoding takes only its bytes' time."""
    dense = shape.experts * 3 * shape.hidden * shape.intermediate * ITEM
    decoding = (packed_bytes(coding, shape) + dense) / (card.bandwidth * 1e9)
    product = max(
        (dense + activation_bytes(tokens, shape)) / (card.bandwidth * 1e9),
        operations(tokens, shape) / (card.tensor * 1e12),
    )
    return 1e6 * (decoding + product) + card.launch


def packed_bytes(coding: str, shape: Shape) -> int:
    """Return the bytes of all experts."""
    group = max(shape.hidden, shape.intermediate) if coding.startswith(RINGS) else GROUP
    return shape.experts * expert_bytes(int(coding[-1]), shape, group)


def operations(tokens: int, shape: Shape) -> int:
    """Return the multiplications and additions of a layer."""
    return 2 * tokens * shape.top_k * 3 * shape.hidden * shape.intermediate


def main() -> None:
    """Print the table of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    tokens = parser.parse_args().tokens
    print("| layer | coding | card | per tile, µs | once, µs | once / per tile | MiB of bfloat16 |")
    print("|---|---|---|---:|---:|---:|---:|")
    for model in ("mixtral-8x7b", "qwen3-30b-a3b"):
        shape = MODELS[model]
        memory = shape.experts * 3 * shape.hidden * shape.intermediate * ITEM / 2**20
        for coding in ("grid2", "trellis2"):
            for card in CARDS:
                each, once = (way(card, coding, tokens, shape) for way in (per_tile_us, once_us))
                print(
                    f"| {model} | {coding} | {card.name} | {each:.0f} | {once:.0f} | {once / each:.2f} | {memory:.0f} |"
                )


if __name__ == "__main__":
    main()
