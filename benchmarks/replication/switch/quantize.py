"""This module scores and orders the experts of a Switch Transformer, and quantizes copies of the model."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn

from benchmarks.replication.switch.text import Batch
from benchmarks.replication.switch.train import Model, Routers, moe_layers
from planner.allocation import level_counts, rank_experts
from planner.quantization.quantizers import quantize_hqq, quantize_rtn
from planner.sensitivity import max_variance, router_norm
from vllm_moeq.format import WHOLE_ROW

OTHER_BITS = 8
ZETA = 3.0

Order = dict[str, list[int]]
"""MoE layer → experts, the highest precision first."""

Widths = dict[str, list[int]]
"""MoE layer → bits per expert."""


@dataclass(frozen=True)
class Scores:
    """The scores of a layer's experts, one number for each.

    Attributes:
        initial: norm of the router when fine-tuning began.
        norm: norm of the fine-tuned router.
        change: change of the norm.
        max_var: largest variance of a neuron of the first matrix.
        tokens: tokens of the calibration examples that chose the expert.
        gates: sum of their gating values.
    """

    initial: list[float]
    norm: list[float]
    change: list[float]
    max_var: list[float]
    tokens: list[int]
    gates: list[float]


@torch.inference_mode()
def usage(model: Model, batches: Iterable[Batch]) -> dict[str, tuple[list[int], list[float]]]:
    """Return layer → (tokens, summed gating values) per expert, padding apart; the decoder reads the right answers."""
    masks: dict[str, torch.Tensor] = {}
    tokens, gates = ({name: torch.zeros(()) for name in moe_layers(model)} for _ in range(2))

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(_router: nn.Module, _inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            real = masks[name.split(".", 1)[0]]
            chosen, gate = outputs[0][real], outputs[1][real]
            tokens[name] = tokens[name] + chosen.sum(dim=0)
            gates[name] = gates[name] + (chosen * gate.double()).sum(dim=0)

        return moe_layers(model)[name].router.register_forward_hook(look)

    handles = [watch(name) for name in tokens]
    try:
        for batch in batches:
            masks = {"encoder": batch.mask.bool(), "decoder": batch.labels != -100}
            inputs = model.prepare_decoder_input_ids_from_labels(batch.labels)
            model(input_ids=batch.source, attention_mask=batch.mask, decoder_input_ids=inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (tokens[name].long().tolist(), gates[name].tolist()) for name in tokens}


def score(model: Model, initial: Routers, batches: Iterable[Batch]) -> dict[str, Scores]:
    """Return what every order needs, by layer."""
    used = usage(model, batches)
    found = {}
    for name, layer in moe_layers(model).items():
        trained = layer.router.classifier.weight.detach()
        experts = [layer.experts[f"expert_{number}"] for number in range(len(trained))]
        found[name] = Scores(
            router_norm(initial[name]),
            router_norm(trained),
            router_norm(trained, initial[name]),
            [max_variance(expert.wi.weight.detach()) for expert in experts],
            *used[name],
        )
    return found


def orders(scores: Mapping[str, Scores]) -> dict[str, Order]:
    """Return the orders that are compared, but random ones."""

    def by(values: str, variances: bool = False, sign: int = 1) -> Order:
        return {
            name: rank_experts(
                [sign * value for value in getattr(layer, values)],
                layer.max_var if variances else [0.0] * len(layer.norm),
                ZETA,
            )
            for name, layer in scores.items()
        }

    return {
        "change": by("change"),
        "change + MaxVar": by("change", variances=True),
        "norm": by("norm"),
        "norm + MaxVar": by("norm", variances=True),
        "frequency": by("tokens", sign=-1),
        "weight": by("gates", sign=-1),
    }


def random_order(scores: Mapping[str, Scores], seed: int) -> Order:
    """Return a permutation of the experts of each layer."""
    dice = random.Random(seed)
    return {name: dice.sample(range(len(layer.norm)), len(layer.norm)) for name, layer in scores.items()}


def moved(order: Order, before: Order) -> int:
    """Return how many experts stand higher in an order than in another."""
    return sum(layer.index(expert) < before[name].index(expert) for name, layer in order.items() for expert in layer)


def assign(order: Order, average: Fraction, choices: Sequence[int]) -> Widths:
    """Give the experts of every layer their widths, the same counts in each."""
    widths = {}
    for name, layer in order.items():
        counts = level_counts(len(layer), choices, average)
        down = [bits for bits in sorted(counts, reverse=True) for _ in range(counts[bits])]
        widths[name] = [bits for _, bits in sorted(zip(layer, down, strict=True))]
    return widths


def uniform(model: Model, bits: int) -> Widths:
    """Give all experts the same width."""
    return {name: [bits] * len(layer.experts) for name, layer in moe_layers(model).items()}


class Shelf:
    """A model's weights at any width, each quantized once.

    One group per row, as in the paper's experiments with Switch Transformer: experts by HQQ, other linears by rounding
    to the nearest of 256 levels. Embeddings, to which the output layer is tied, and routers stay as they are.

    Args:
        model: the original, which is not changed.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._kept: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, name: str, bits: int) -> torch.Tensor:
        """Return a matrix at a width, dequantized; a matrix of an expert if its name says so."""
        if (name, bits) not in self._kept:
            quantize = quantize_hqq if ".experts." in name else quantize_rtn
            weight = self.model.get_submodule(name).weight.detach()
            self._kept[name, bits] = quantize(weight, bits, WHOLE_ROW).dequantize()
        return self._kept[name, bits]

    @torch.no_grad()
    def quantized(self, widths: Widths | None, other_bits: int = OTHER_BITS) -> Model:
        """Return a copy of the model; without widths its experts stay as they are."""
        found = copy.deepcopy(self.model)
        for name, module in found.named_modules():
            if not isinstance(module, nn.Linear) or name == "lm_head" or ".router." in name:
                continue
            layer, is_expert, rest = name.partition(".experts.expert_")
            if not is_expert:
                module.weight.copy_(self.take(name, other_bits))
            elif widths is not None:
                module.weight.copy_(self.take(name, widths[layer][int(rest.split(".")[0])]))
        return found
