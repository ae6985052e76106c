"""This module reads the models of :mod:`benchmarks.replication.switch.run`, and trains those that are missing.

There are three models: the pre-trained one, its fine-tuned version, and a version that is fine-tuned from random
routers with little variance. The paper's Tables 3 and 4 need the last one. A folder beside each model holds the routers
with which its training began. The routers from the start of fine-tuning are the paper's w^(0), because the paper speaks
of the change of norm "during fine-tuning".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.replication.switch.text import Text, denoising_batches, example_batches
from benchmarks.replication.switch.train import (
    PAPER_SIGMA,
    ROUTER_SCALE,
    Model,
    Recipe,
    Routers,
    configuration,
    fit,
    optimizers,
    restart_routers,
    routers,
)
from planner.output.files import write_json, write_tensors
from vllm_moeq.format import CheckpointError, read_json

PRETRAINING_RATE = 1e-2
FINETUNING_RATE = 5e-3

STARTS = {"pre-trained": "finetuned", "random": "finetuned-random-routers"}
"""The kind of routers when fine-tuning begins → folder."""


class Trained(NamedTuple):
    """A model and where it came from.

    Attributes:
        model: in evaluation mode.
        initial: its routers before this training.
        facts: how it was trained.
    """

    model: Model
    initial: Routers
    facts: dict[str, Any]


def pretrain(folder: Path, text: Text, recipe: Recipe) -> Trained:
    """Return the pre-trained model; its initial routers are random."""

    def begin() -> Model:
        torch.manual_seed(recipe.seed)
        model = Model(configuration(recipe, len(text.tokenizer), int(text.tokenizer.pad_token_id)))
        restart_routers(model, math.sqrt(ROUTER_SCALE / recipe.hidden), recipe.seed)
        return model

    def train(model: Model) -> list[float]:
        batches = denoising_batches(text, recipe.batch, recipe.pretraining, recipe.seed)
        return fit(model, batches, recipe.pretraining, PRETRAINING_RATE, optimizers(model))

    # How long it is fine-tuned later on makes no difference.
    return _stage(folder / "pretrained", replace(recipe, finetuning=0), begin, train)


def finetune(folder: Path, text: Text, recipe: Recipe, start: str) -> Trained:
    """Return the fine-tuned model; its initial routers are the pre-trained ones, or drawn as in section 5.4.

    Args:
        folder: the folder with the pre-trained model.
        text: the text to read.
        recipe: the same as the pre-trained model's.
        start: one of :data:`STARTS`.
    """

    def begin() -> Model:
        model = pretrain(folder, text, recipe).model
        if start == "random":
            restart_routers(model, PAPER_SIGMA, recipe.seed + 1)
        return model

    def train(model: Model) -> list[float]:
        batches = example_batches(text, recipe.batch, recipe.finetuning, recipe.seed)
        return fit(model, batches, recipe.finetuning, FINETUNING_RATE, optimizers(model))

    return _stage(folder / STARTS[start], recipe, begin, train)


def _stage(folder: Path, recipe: Recipe, begin: Callable[[], Model], train: Callable[[Model], list[float]]) -> Trained:
    done = folder / "training.json"  # written last
    if not done.is_file():
        print(f"training {folder.name}", flush=True)
        began, model = time.monotonic(), begin()
        initial = routers(model)
        losses = train(model)
        model.save_pretrained(folder)
        write_tensors(folder / "initial-router.safetensors", initial)
        last = losses[-50:]
        facts = {
            "recipe": asdict(recipe),
            "parameters": model.num_parameters(),
            "steps": len(losses),
            "final_training_loss": round(sum(last) / len(last), 4),
            "seconds": round(time.monotonic() - began, 1),
            "threads": torch.get_num_threads(),
        }
        write_json(done, facts)
    facts = read_json(done)
    if facts["recipe"] != asdict(recipe):
        raise CheckpointError(f"{folder}: trained with other settings, {facts['recipe']}")
    model = Model.from_pretrained(folder, dtype=torch.float32).eval()
    return Trained(model, load_file(folder / "initial-router.safetensors"), facts)
