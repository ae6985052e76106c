"""Peak memory of quantizing and calibrating: what Python holds now, and what the work adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibration.gptq.layer import BATCH_BYTES
from planner.calibration.reading.decoder import ROWS
from planner.calibration.reading.text import CalibrationText
from planner.common.memory import resident_bytes
from planner.estimates.serving import text_config
from planner.model.layout import Layout
from planner.model.sizes import WORKING_BYTES_PER_WEIGHT, Sizes
from planner.quantization.quantizers.hqq import BLOCK_WEIGHTS
from planner.quantization.rows import BLOCKS

SHARD_COPIES = 2
"""A layer's packed tensors, and the bytes that safetensors writes."""

FACTOR_COPIES = 4
"""Second moments of a batch of experts, and what factoring them takes."""

HIDDEN_FILES = 4
"""Inputs and outputs of a layer and of its experts, mapped while it runs."""

FLOAT = 4


@dataclass(frozen=True)
class Reading:
    """A text that a model reads, and for what.

    Attributes:
        sequences: how many.
        length: tokens of each.
        gptq: experts are quantized by GPTQ on the way.
    """

    sequences: int
    length: int
    gptq: bool = False

    @classmethod
    def of(cls, text: CalibrationText | None, gptq: bool = False) -> Reading | None:
        """Return the reading of a text, if there is one."""
        return None if text is None else cls(len(text.tokens), text.tokens.shape[1], gptq)

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length


def rounding_ram(sizes: Sizes, threads: int, jobs: int) -> int:
    """Return the resident bytes of quantizing without calibration: this process, or its workers and it."""
    part = BLOCKS * BLOCK_WEIGHTS * WORKING_BYTES_PER_WEIGHT
    own, working = resident_bytes(), SHARD_COPIES * sizes.largest_shard_bytes + threads * part
    return own + working if jobs == 1 else own + jobs * (own + working)


def reading_ram(config: Mapping[str, Any], layout: Layout, reading: Reading, sizes: Sizes | None, device: str) -> int:
    """Return the resident bytes of this process while a model reads a text layer by layer."""
    own = resident_bytes() + hidden_bytes(config, reading)
    if reading.gptq and sizes is not None:
        own += SHARD_COPIES * sizes.largest_shard_bytes
    return own + (device_working(config, layout, reading, "cpu") if device == "cpu" else 0)


def device_working(config: Mapping[str, Any], layout: Layout, reading: Reading, device: str) -> int:
    """Return the bytes of activations, of a batch of experts and of their second moments, where they are computed."""
    text = text_config(config)
    heads = int(text.get("num_attention_heads") or 1)
    scores = 2 * FLOAT * ROWS * min(reading.length, ROWS) * heads
    experts = layout.layers[0]
    columns = max(columns for _, columns in experts.shapes.values())
    count = 1
    if reading.gptq:
        count = min(experts.num_experts, max(1, BATCH_BYTES[device] // (FLOAT * columns**2)))
    batch = FLOAT * count * (2 * experts.weights_per_expert + (FACTOR_COPIES * columns**2 if reading.gptq else 0))
    return max(scores, batch)


def hidden_bytes(config: Mapping[str, Any], reading: Reading) -> int:
    """Return the bytes of the files between layers."""
    return HIDDEN_FILES * FLOAT * reading.tokens * int(text_config(config).get("hidden_size") or 0)
