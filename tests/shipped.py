"""The sizes of the shipped models, as their config.json has them: training may give either another size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import planner
from tests.paths import MIXTRAL


@dataclass(frozen=True)
class Sizes:
    """What tests count.

    Attributes:
        layers: number of layers, each with experts.
        experts: number of experts of a layer.
        chosen: number of experts that a token takes.
        hidden: length of a token's state.
        vocabulary: number of tokens that there are.
    """

    layers: int
    experts: int
    chosen: int
    hidden: int
    vocabulary: int

    @property
    def all_experts(self) -> int:
        """Return the number of experts of all layers."""
        return self.layers * self.experts


def sizes_of(folder: Path) -> Sizes:
    """Return a model's sizes."""
    config = json.loads((folder / "config.json").read_text())
    names = ("num_hidden_layers", "num_local_experts", "num_experts_per_tok", "hidden_size", "vocab_size")
    return Sizes(*(config[name] for name in names))


MIXTRAL_SIZES = sizes_of(MIXTRAL)
MIXTRAL_PREFIXES = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(MIXTRAL_SIZES.layers)]


def mixtral_gib(average_bits: float) -> float:
    """Return what the shipped Mixtral takes with its experts at an average, in GiB."""
    made = planner.plan(MIXTRAL, method="router-norm", avg_bits=average_bits)
    assert made.sizes is not None
    return float(made.sizes.total_bytes) / 2**30
