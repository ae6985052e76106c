"""This module defines and trains the Switch Transformer of :mod:`benchmarks.replication.switch.run`.

Training follows its authors: spans of text are removed, each token goes to one expert, and extra losses balance experts
and keep router logits small.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from benchmarks.models.balance import layer_balance
from benchmarks.models.fit import learning_rate
from benchmarks.models.muon import Muon
from benchmarks.replication.switch.text import SOURCE_TOKENS, Batch

Model: TypeAlias = SwitchTransformersForConditionalGeneration
Routers = dict[str, torch.Tensor]
"""MoE layer → router weight [experts, hidden]."""

BALANCE = 0.01
Z_LOSS = 0.001
ROUTER_SCALE = 0.1
"""A router begins with variance ROUTER_SCALE / hidden (Fedus et al., section 2.4); transformers would begin with 1."""

PAPER_SIGMA = 0.0005
"""Standard deviation of the routers that begin anew (paper, section 5.4)."""


@dataclass(frozen=True)
class Recipe:
    """The settings that decide the trained models.

    Attributes:
        hidden: width of the model.
        inner: width of feed-forward layers and of experts.
        experts: per MoE layer.
        layers: blocks of the encoder, and of the decoder; every second one is an MoE block.
        batch: sequences per step.
        pretraining: steps.
        finetuning: steps.
        seed: the seed of weights, windows and orders.
    """

    hidden: int = 128
    inner: int = 256
    experts: int = 16
    layers: int = 4
    batch: int = 32
    pretraining: int = 300
    finetuning: int = 500
    seed: int = 0


QUICK = Recipe(hidden=32, inner=64, experts=8, layers=2, batch=8, pretraining=6, finetuning=6)


def configuration(recipe: Recipe, vocabulary: int, pad: int) -> SwitchTransformersConfig:
    """Return the shape of the model.

    Every expert has room for all tokens of a sequence: none is dropped. No jitter: transformers applies it in place, to
    what the experts read as well.
    """
    return SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=recipe.hidden,
        d_kv=32,
        num_heads=recipe.hidden // 32,
        d_ff=recipe.inner,
        num_layers=recipe.layers,
        num_decoder_layers=recipe.layers,
        num_sparse_encoder_layers=recipe.layers // 2,
        num_sparse_decoder_layers=recipe.layers // 2,
        num_experts=recipe.experts,
        expert_capacity=SOURCE_TOKENS,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        pad_token_id=pad,
        eos_token_id=0,
        decoder_start_token_id=pad,
    )


def moe_layers(model: torch.nn.Module) -> dict[str, SwitchTransformersSparseMLP]:
    """Return the MoE layers by name, those of the encoder first."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "router")}


def routers(model: torch.nn.Module) -> Routers:
    """Return a copy of the routers' weights."""
    return {name: layer.router.classifier.weight.detach().clone() for name, layer in moe_layers(model).items()}


@torch.no_grad()
def restart_routers(model: torch.nn.Module, sigma: float, seed: int) -> None:
    """Draw all routers from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    for layer in moe_layers(model).values():
        layer.router.classifier.weight.normal_(0.0, sigma, generator=generator)


def objective(model: Model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss to minimise, and the part of it that the tokens make.

    The balancing loss is each layer's own: transformers pools all layers, and counts padding.
    """
    outputs = model(
        input_ids=batch.source,
        attention_mask=batch.mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch.labels),
        output_router_logits=True,
        use_cache=False,
    )
    loss = functional.cross_entropy(outputs.logits.flatten(0, 1), batch.labels.flatten())
    read, written = batch.mask.bool(), batch.labels != -100
    logits = [layer[read] for layer in outputs.encoder_router_logits]
    logits += [layer[written] for layer in outputs.decoder_router_logits]
    z_loss = torch.stack([layer.logsumexp(dim=-1).square().mean() for layer in logits]).mean()
    return loss + BALANCE * layer_balance(logits, 1) + Z_LOSS * z_loss, loss


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, routers and norms."""
    named = [(name, p, p.ndim == 2 and not name.startswith("shared")) for name, p in model.named_parameters()]
    inner = [p for name, p, matrix in named if matrix and "router" not in name and "bias" not in name]
    rest = [p for name, p, matrix in named if not matrix or "router" in name or "bias" in name]
    return [Muon(inner, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]


def fit(
    model: Model, batches: Iterable[Batch], steps: int, peak: float, steppers: list[torch.optim.Optimizer]
) -> list[float]:
    """Train in place and return the tokens' loss at every step."""
    model.train()
    began, losses = time.monotonic(), []
    for step, batch in enumerate(batches):
        loss, tokens = objective(model, batch)
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:  # an expert that no token chose; Muon wants a gradient
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        losses.append(float(tokens.detach()))
        if step % 20 == 0 or step == steps - 1:
            recent = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step:4d}  loss {recent:.3f}  {time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    return losses
