"""Estimate the needs of running a model and its reference over a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.calibration.kl.gradients import head_rows
from planner.calibration.reading.decoder import ROWS, compute_dtype
from planner.calibration.reading.expert import EXPERT_COPIES
from planner.common.memory import resident_bytes
from planner.estimates.memory import FLOAT, Reading
from planner.estimates.needs import Needs
from planner.estimates.seconds import reading_seconds
from planner.estimates.serving import text_config
from planner.evaluation.passes import FILES, LOGITS_ALONE, LOGITS_BESIDE, STATES
from planner.evaluation.reader import reads_by_layers
from planner.model.layout import Layout, read_layout
from planner.model.quantized import DequantizedModel, is_moeq
from planner.model.skeleton import open_folder
from vllm_moeq.format import read_config_json

RESULT_BYTES = 2048
"""Bytes of the file with the result."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that matter when it reads a text.

    Attributes:
        config: contents of config.json.
        layout: the model's layout; None if transformers loads the whole model.
        layer_bytes: bytes of the largest decoder layer without its experts, or of a larger embedding or head.
        expert_bytes: bytes of one expert in float32.
        whole_bytes: bytes of the whole model in memory.
    """

    config: dict[str, Any]
    layout: Layout | None
    layer_bytes: int
    expert_bytes: int
    whole_bytes: int

    @classmethod
    def of(cls, folder: Path, item: int) -> ModelSize:
        """Return the sizes of a model from its headers.

        Args:
            folder: the model's folder.
            item: bytes per value in the dtype that the model computes in.

        Raises:
            MoeqError: a damaged checkpoint.
        """
        config = read_config_json(folder / "config.json")
        with DequantizedModel(folder) if is_moeq(config) else open_folder(folder, True) as model:
            stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            if not reads_by_layers(folder):
                values = sum(info.numel for info in model.shards.tensors.values())
                return cls(dict(config), None, 0, 0, stored if is_moeq(config) else item * values)
            layout = read_layout(model)
            blocks: dict[object, int] = {}
            for name in (*layout.linears, *layout.kept):
                block = layout.block_of(name)
                key = name if block is None else block
                blocks[key] = blocks.get(key, 0) + item * model.shards.info(name).numel
            expert = max(layer.weights_per_expert for layer in layout.layers)
            return cls(dict(config), layout, max(blocks.values()), FLOAT * expert, stored)


def eval_needs(folders: Sequence[Path], tokens: int, window: int, device: torch.device) -> Needs:
    """Return the needs of ``moeq eval --data``.

    Args:
        folders: folder of the model, then of the reference if there is one.
        tokens: number of tokens of the text.
        window: tokens per window.
        device: device that the models run on.

    Raises:
        MoeqError: a damaged checkpoint.
    """
    item = compute_dtype(device).itemsize
    sizes = [ModelSize.of(folder, item) for folder in folders]
    state = max(item * int(text_config(size.config).get("hidden_size") or 0) for size in sizes)
    files = min(STATES, state * tokens) * (FILES + len(folders) - 1)
    own = resident_bytes()
    working = max(max(_reading_bytes(size, item, window), _head_bytes(size, tokens, len(folders))) for size in sizes)
    return Needs(
        written_bytes=RESULT_BYTES,
        temporary_bytes=files,
        ram_bytes=own + files + (working if device.type == "cpu" else 0),
        device_bytes=working if device.type != "cpu" else 0,
        seconds=sum(_seconds(size, tokens, window, device) for size in sizes),
    )


def _reading_bytes(size: ModelSize, item: int, window: int) -> int:
    """Return the bytes of a layer, or of a whole model, and its activations."""
    text = text_config(size.config)
    scores = 2 * FLOAT * ROWS * min(window, ROWS) * int(text.get("num_attention_heads") or 1)
    rows = 4 * item * ROWS * int(text.get("hidden_size") or 0)
    return (
        size.whole_bytes * (size.layout is None)
        + size.layer_bytes
        + EXPERT_COPIES * size.expert_bytes
        + max(scores, rows)
    )


def _head_bytes(size: ModelSize, tokens: int, models: int) -> int:
    """Return the bytes of the logits of one step of the head, and of the model if it is loaded whole."""
    vocabulary = int(text_config(size.config).get("vocab_size") or 1)
    copies = LOGITS_ALONE if models == 1 else LOGITS_BESIDE
    return size.whole_bytes * (size.layout is None) + copies * FLOAT * vocabulary * min(tokens, head_rows(vocabulary))


def _seconds(size: ModelSize, tokens: int, window: int, device: torch.device) -> float:
    """Return the seconds that a model takes to read the text; 0 if its layout is not known."""
    if size.layout is None:
        return 0.0
    return reading_seconds(size.config, size.layout, Reading(tokens // window or 1, window), 1.0, device)
