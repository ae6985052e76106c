"""Estimate the peak memory of quantizing and calibrating: the process's memory now, and the memory for the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.calibration.gptq.layer import BATCH_BYTES
from planner.calibration.reading.decoder import ROWS
from planner.calibration.reading.hidden import HIDDEN_FILES, ORIGINAL_FILES
from planner.calibration.reading.text import CalibrationText
from planner.common.memory import resident_bytes
from planner.estimates.serving import text_config
from planner.model.layout import Layout
from planner.model.sizes import Sizes
from planner.output.files import SHARD_COPIES
from planner.quantization.quantizers.hessian import FACTOR_COPIES
from planner.quantization.quantizers.target import SHIFT_COPIES
from planner.quantization.rows import part_bytes

FLOAT = 4


@dataclass(frozen=True)
class Reading:
    """A model's run over a text.

    Attributes:
        sequences: number of sequences.
        length: tokens per sequence.
        streams: number of streams of hidden states that GPTQ carries during the run: one, or two to calibrate
            asymmetrically; 0 without GPTQ.
        sweeps: number of passes over all codes after GPTQ.
    """

    sequences: int
    length: int
    streams: int = 0
    sweeps: int = 0

    @classmethod
    def of(cls, text: CalibrationText | None, streams: int = 0, sweeps: int = 0) -> Reading | None:
        """Return the run over a text; None without a text."""
        return None if text is None else cls(len(text.tokens), text.tokens.shape[1], streams, sweeps)

    @property
    def gptq(self) -> bool:
        """Whether GPTQ quantizes the layers during the run."""
        return self.streams > 0

    @property
    def asymmetric(self) -> bool:
        """Whether GPTQ carries the original model's hidden states too."""
        return self.streams > 1

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self.sequences * self.length


def rounding_ram(layout: Layout, sizes: Sizes, row_step: int, threads: int, jobs: int) -> int:
    """Return the resident bytes of quantizing without calibration, for this process and its workers together.

    Args:
        layout: the source's layout.
        sizes: sizes of the output.
        row_step: rows that the experts' scheme keeps together.
        threads: number of threads of each process.
        jobs: number of processes that quantize.
    """
    part = max(part_bytes(columns, row_step) for layer in layout.layers for _, columns in layer.shapes.values())
    own, working = resident_bytes(), SHARD_COPIES * sizes.largest_shard_bytes + threads * part
    return own + working if jobs == 1 else own + jobs * (own + working)


def reading_ram(config: Mapping[str, Any], layout: Layout, reading: Reading, sizes: Sizes | None, device: str) -> int:
    """Return the resident bytes of this process while a model reads a text layer by layer."""
    own = resident_bytes() + hidden_bytes(config, reading)
    if reading.gptq and sizes is not None:
        own += SHARD_COPIES * sizes.largest_shard_bytes
    return own + (device_working(config, layout, reading, "cpu") if device == "cpu" else 0)


def device_working(config: Mapping[str, Any], layout: Layout, reading: Reading, device: str) -> int:
    """Return the peak bytes on the device: activations, or a batch of experts and their Hessians if that is more."""
    text = text_config(config)
    heads = int(text.get("num_attention_heads") or 1)
    scores = 2 * FLOAT * ROWS * min(reading.length, ROWS) * heads
    experts = layout.layers[0]
    columns = max(columns for _, columns in experts.shapes.values())
    count = 1
    if reading.gptq:
        count = min(experts.num_experts, max(1, BATCH_BYTES[device] // (FLOAT * columns**2)))
    copies = (FACTOR_COPIES if reading.gptq else 0) + (SHIFT_COPIES if reading.asymmetric else 0)
    lost = math.prod(experts.shapes[experts.projections.down]) if reading.asymmetric else 0
    batch = FLOAT * count * (2 * experts.weights_per_expert + copies * columns**2 + lost)
    return max(scores, batch)


def hidden_bytes(config: Mapping[str, Any], reading: Reading) -> int:
    """Return the bytes of the files of hidden states."""
    files = HIDDEN_FILES + (ORIGINAL_FILES if reading.asymmetric else 0)
    return files * FLOAT * reading.tokens * int(text_config(config).get("hidden_size") or 0)
