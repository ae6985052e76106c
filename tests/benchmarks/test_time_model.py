"""The model of time: a hand computation, monotone in what it counts, and the card by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.kernels.moe_layer import describe
from benchmarks.kernels.prefill_model import once_us, per_tile_us
from benchmarks.kernels.routing import MODELS, Shape
from benchmarks.kernels.time_model import (
    CARDS,
    INSTRUCTIONS,
    Card,
    card_named,
    estimate,
    estimate_grids,
    launch_us,
    visited_by,
)
from vllm_moeq.kernels.triton.schedule import FEW, FEW_TOKENS

ROUND = Card("round", ("Round",), 100, 1.0, 1000, 228, 100, launch=2.0)
"""12.8 · 10¹² instructions a second."""


def test_a_launch_by_hand() -> None:
    fixed = 2 * 0.7 + 2.0
    assert launch_us(ROUND, 1e6, 0, 1e4, FEW[0]) == pytest.approx(1 + fixed)
    assert launch_us(ROUND, 0, 12.8e6, 1e4, FEW[0]) == pytest.approx(1 + fixed)
    assert launch_us(ROUND, 0, 12.8e6, 50, FEW[0]) == pytest.approx(2 + fixed), "two warps for four schedulers"
    assert launch_us(ROUND, 3e6, 12.8e6, 1e4, FEW[0]) == pytest.approx(3 + fixed), "the slower stream counts"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_more_bits_experts_and_tokens_take_no_less(card: Card) -> None:
    shape = MODELS["mixtral-8x7b"]
    widths = [estimate(card, [f"grid{width}"], 2, 1, shape, 128).layer for width in (1, 2, 3, 4)]
    assert widths == sorted(widths)
    experts = [
        estimate(card, ["trellis2"], visited_by(tokens, shape), tokens, shape, 128).layer for tokens in (1, 4, 16)
    ]
    assert experts == sorted(experts)
    mixed = estimate(card, ["grid2", "grid3"], 2, 1, shape, 128).layer
    assert widths[1] <= mixed <= widths[2]


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 SXM"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("x86_64 CPU", None),
    ],
)
def test_cards_by_name(name: str, card: str | None) -> None:
    found = card_named(name)
    assert (found.name if found else None) == card


def test_a_layer_of_the_benchmark() -> None:
    shape, card = MODELS["qwen3-30b-a3b"], CARDS[1]
    same = estimate(card, ["grid2"], 8, 1, shape, 128).layer
    assert estimate_grids("NVIDIA H200", [2] * 128, 1, shape, 128) == pytest.approx(same)
    assert estimate_grids("NVIDIA H200", [2] * 128, 17, shape, 128) is None
    assert estimate_grids("NVIDIA H200", [2, 8] * 64, 1, shape, 128) is None, "eight bits were not counted"
    assert estimate_grids("x86_64 CPU", [2] * 128, 1, shape, 128) is None
    row = {"model": "m", "mix": "2,3", "routing": "uniform", "tokens": 1, "bytes": 1e6, "estimate_us": 12.0,
           "peers": {"triton": {"us": 15.0, "error": 0.0, "note": ""}}}  # fmt: skip
    assert "15.0 µs, error 0.0e+00, 2% of bandwidth, estimate 12.0 µs" in "\n".join(describe(row, 4e12))


def test_a_prompt_by_hand() -> None:
    """Two experts with 128 tokens each, two tiles; each of the three streams is once the slowest."""
    shape, weights = Shape(2, 1, 128, 128), 3 * 128 * 128
    packed, dense = 2 * (weights // 4 + 4 * 3 * 128), 2 * weights * 2
    moved = 2 * (2 * 256 * 128 + 2 * 256 * 128)
    operations = 2 * 256 * weights
    assert per_tile_us(ROUND, "grid2", 256, shape) == pytest.approx((packed + moved) / 1e6)
    assert once_us(ROUND, "grid2", 256, shape) == pytest.approx((packed + dense + dense + moved) / 1e6 + 2)
    fast = replace(ROUND, bandwidth=1e9)
    assert per_tile_us(fast, "grid2", 256, shape) == pytest.approx(operations / 100e6)
    assert once_us(fast, "grid2", 256, shape) == pytest.approx(operations / 100e6 + 2, rel=1e-3)
    issued = 2 * 2 * weights * INSTRUCTIONS["grid2"][2]
    assert per_tile_us(replace(fast, tensor=1e6), "grid2", 256, shape) == pytest.approx(issued / 12.8e6)


def test_only_counted_launches_are_estimated() -> None:
    with pytest.raises(ValueError, match="expected 1 to 16 tokens, found 17"):
        estimate(ROUND, ["grid2"], 2, FEW_TOKENS + 1, MODELS["tiny"], 128)
    assert all(few <= more <= most for few, more, most in INSTRUCTIONS.values())
    assert visited_by(1, Shape(8, 2, 128, 64)) == pytest.approx(2)
