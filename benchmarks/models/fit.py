"""Train a small model on a stream of tokens; a killed training continues from its last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.models.balance import layer_balance, shares
from benchmarks.models.muon import Muon
from planner.output.files import atomic

SEQUENCE = 512
SHOWN = 50
"""Steps from one printed line to the next."""


@dataclass(frozen=True)
class Training:
    """The settings of a training.

    Attributes:
        steps: number of steps.
        batch: sequences of :data:`SEQUENCE` tokens per step.
        learning_rate: the largest learning rate.
        seed: seed of the weights before training and of the batches.
        balance_weight: weight of each layer's balancing loss.
        checkpoint: steps from one checkpoint to the next; it does not change the result.
    """

    steps: int = 5700
    batch: int = 8
    learning_rate: float = 1e-2
    seed: int = 0
    balance_weight: float = 0.05
    checkpoint: int = 200


def batches(stream: torch.Tensor, training: Training) -> Iterator[torch.Tensor]:
    """Yield a batch [sequences, SEQUENCE] of random windows for each step, each epoch a new permutation."""
    generator = torch.Generator().manual_seed(training.seed)
    windows = stream.numel() // SEQUENCE - 1
    order: list[int] = []
    for _ in range(training.steps):
        rows = []
        for _ in range(training.batch):
            if not order:
                offset = int(torch.randint(SEQUENCE, (1,), generator=generator))
                order = [offset + i * SEQUENCE for i in torch.randperm(windows, generator=generator).tolist()]
            start = order.pop()
            rows.append(stream[start : start + SEQUENCE])
        yield torch.stack(rows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, constant, then linear to zero over the last half."""
    return peak * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, routers and norms."""
    outside = ("embed_tokens", "lm_head", ".gate.")
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim >= 2 and not any(part in name for part in outside)]
    rest = [p for name, p in named if p.ndim < 2 or any(part in name for part in outside)]
    return [Muon(inner, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]


def fit(model: PreTrainedModel, stream: torch.Tensor, training: Training, state: Path) -> None:
    """Train in place, in bfloat16 with float32 weights. Print a line every :data:`SHOWN` steps.

    Args:
        model: the model before training, or any state of it if there is a checkpoint.
        stream: int64 tokens.
        training: the settings.
        state: file of the checkpoint, from which an unfinished training continues.

    Raises:
        CheckpointError: a full disk.
    """
    steppers = optimizers(model)
    if model.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    # transformers' own loss pools all layers; it is computed, but does not count.
    model.router_aux_loss_coef, model.config.router_aux_loss_coef = 0.0, training.balance_weight
    first, began = load_state(model, steppers, state), time.monotonic()
    recent: torch.Tensor | None = None
    for step, tokens in enumerate(batches(stream, training)):
        if step < first:
            continue
        rate = learning_rate(step, training.steps, training.learning_rate)
        loss, chosen = take_step(model, steppers, tokens.to(model.device), rate, training.balance_weight)
        recent = chosen if recent is None else recent.lerp(chosen, 0.05)
        if step % SHOWN == 0 or step == training.steps - 1:
            speed = (step + 1 - first) * tokens.numel() / (time.monotonic() - began)
            least = float(recent.min()) * recent.shape[1]
            print(
                f"step {step:5d}  loss {loss:.3f}  {speed:,.0f} tokens/s  least share {least:.2f} of the mean",
                flush=True,
            )
        if (step + 1) % training.checkpoint == 0:
            save_state(model, steppers, step + 1, state)


def take_step(
    model: PreTrainedModel, steppers: list[torch.optim.Optimizer], tokens: torch.Tensor, rate: float, balance: float
) -> tuple[float, torch.Tensor]:
    """Update all parameters once; return the loss without balance, and each expert's share [layers, experts]."""
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = rate
    with torch.autocast(model.device.type, torch.bfloat16):
        outputs = model(input_ids=tokens, labels=tokens)
    logits, top_k = outputs.router_logits, model.config.num_experts_per_tok
    (outputs.loss + balance * layer_balance(logits, top_k)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad(set_to_none=True)
    return outputs.loss.item(), shares(logits, top_k)


def save_state(model: PreTrainedModel, steppers: list[torch.optim.Optimizer], step: int, path: Path) -> None:
    """Write a checkpoint: the weights and the optimizers after so many steps.

    Raises:
        CheckpointError: a full disk.
    """
    state = {"step": step, "model": model.state_dict(), "steppers": [stepper.state_dict() for stepper in steppers]}
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(model: PreTrainedModel, steppers: list[torch.optim.Optimizer], path: Path) -> int:
    """Put a checkpoint into a model and its optimizers, if there is one; return the steps that it has taken."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    for stepper, found in zip(steppers, state["steppers"], strict=True):
        stepper.load_state_dict(found)
    return int(state["step"])
