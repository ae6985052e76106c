"""HAWQ-v2: the cost of rounding each layer's experts, from the curvature of the loss.

Source: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", 2020. A layer's cost at a
width is Σ over its tensors of (trace of the Hessian / number of weights) · ‖Q(W) − W‖². Unlike everything else in this
package, the traces need the whole model in memory, in float32, with its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from planner.calibration.reading.expert import load_expert
from planner.calibration.reading.rounded import rounded
from planner.common.install import require
from planner.common.memory import available_bytes, explained_if_out_of_memory, out_of_memory
from planner.common.progress import Progress
from planner.model.layout import Layout, architecture_of
from planner.model.source import SourceModel
from vllm_moeq.completeness import cannot_load
from vllm_moeq.format import CheckpointError, ConfigError, UsageError

PARTS = {"gate_up_proj": "gate_up", "down_proj": "down"}
"""Parameter of transformers' experts module [experts, outputs, inputs] → its name here."""

EXPERT_COPIES = 3
"""Copies of the experts in memory besides the model: gradient, probe, and the Hessian's product with the probe."""

CPU = torch.device("cpu")
TensorList = Sequence[torch.Tensor]


@dataclass(frozen=True)
class LayerTrace:
    """The mean trace (trace / number of weights) of the Hessian in one layer's experts, in nats per squared weight.

    Attributes:
        mean: mean trace over all expert weights of the layer.
        error: standard error of ``mean`` over the probes; it does not include the change that another text would make.
        parts: mean traces of the gate and up projections of all experts ("gate_up") and of their down projections
            ("down").
        part_errors: standard errors of ``parts``.
    """

    mean: float
    error: float
    parts: dict[str, float]
    part_errors: dict[str, float]


def layer_traces(
    model: SourceModel,
    layout: Layout,
    tokens: torch.Tensor,
    device: torch.device,
    progress: Progress,
    probes: int = 16,
    seed: int = 0,
    batch: int = 4,
) -> dict[str, LayerTrace]:
    """Estimate mean traces by Hutchinson's method: the mean of vᵀHv over vectors v of random signs.

    H is the Hessian of the mean cross entropy per predicted token, in nats. The choice of experts has no derivative.
    One v covers all layers: the part of vᵀ(Hv) that lies in a layer estimates the layer's trace, since products of two
    different signs have mean zero. H is a sum over batches of text, and each batch draws its own signs. This is as
    unbiased as one v for all batches, and the common part of the batches adds less noise. The graph of a batch serves
    all probes.

    Args:
        model: the model, not quantized.
        layout: its layers.
        tokens: int64 [sequences, length].
        device: device for the whole computation.
        progress: shows the progress.
        probes: number of sign vectors for each batch.
        seed: seed of the signs; the signs also depend on ``batch`` and on the kind of device.
        batch: sequences per batch; their activations take memory that :func:`check_memory` does not count.

    Returns:
        Experts prefix → trace.

    Raises:
        ValueError: fewer than two probes, which have no standard error, or fewer than two tokens, which predict
            nothing.
        MoeqError: not enough memory, a model that transformers does not load as expected, or a Hessian that is not
            finite.
    """
    if probes < 2 or tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"expected probes >= 2 and tokens [>= 1, >= 2], found {probes} and {list(tokens.shape)}")
    check_memory(model, layout, device)
    size = f"the Hessian of {batch} sequences of {tokens.shape[1]} tokens"
    with (
        explained_if_out_of_memory(f"on {device.type} for {size}; fewer or shorter ones take less"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        network = load_network(model, device)
        parameters = expert_parameters(network, model, layout)
        samples = _samples(network, parameters, tokens.split(batch), progress, probes, seed)
    if not bool(torch.isfinite(samples).all()):
        raise CheckpointError(f"{model.folder}: expected a finite Hessian, found NaN or infinity")
    sizes = torch.tensor([parameter.numel() for parameter in parameters]).reshape(-1, len(PARTS))
    return {layer.prefix: _trace(samples[:, at], sizes[at]) for at, layer in enumerate(layout.layers)}


def _trace(samples: torch.Tensor, sizes: torch.Tensor) -> LayerTrace:
    """Return mean traces from a layer's sampled traces, float64 [probes, parts], and numbers of weights [parts]."""
    means = torch.cat([samples.sum(dim=1, keepdim=True) / sizes.sum(), samples / sizes], dim=1)
    (mean, *parts), (error, *errors) = means.mean(dim=0).tolist(), (means.std(dim=0) / len(means) ** 0.5).tolist()
    return LayerTrace(mean, error, *(dict(zip(PARTS.values(), each, strict=True)) for each in (parts, errors)))


def _samples(
    network: torch.nn.Module, parameters: TensorList, batches: TensorList, progress: Progress, probes: int, seed: int
) -> torch.Tensor:
    """Return each parameter's share of vᵀ(Hv), float64 [probes, layers, parts]."""
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(seed)
    samples = torch.zeros(probes, len(parameters), dtype=torch.float64)
    predicted = sum(tokens[:, 1:].numel() for tokens in batches)
    steps = [(tokens, probe) for tokens in batches for probe in range(probes)]
    gradients: TensorList = ()
    for tokens, probe in progress.track(steps, "Hessian traces"):
        if probe == 0:
            gradients = ()  # free the last batch's graph before the next one is made
            loss = summed_loss(network, tokens.to(device)) / predicted
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        signs = [torch.empty_like(each).bernoulli_(0.5, generator=generator).mul_(2).sub_(1) for each in parameters]
        products = hessian_product(gradients, parameters, signs)
        for index, (product, sign) in enumerate(zip(products, signs, strict=True)):
            samples[probe, index] += product.mul_(sign).sum(dtype=torch.float64).cpu()
    return samples.reshape(probes, -1, len(PARTS))


def summed_loss(network: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of every token [sequences, length] given those before it, summed, in nats."""
    logits = network(input_ids=tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def hessian_product(gradients: TensorList, parameters: TensorList, vectors: TensorList) -> TensorList:
    """Return H·vectors, one tensor per parameter; ``gradients`` need ``create_graph``, and their graph is kept."""
    return torch.autograd.grad(gradients, parameters, vectors, retain_graph=True, materialize_grads=True)


def load_network(model: SourceModel, device: torch.device) -> torch.nn.Module:
    """Load a causal language model in float32, without gradients.

    Raises:
        MoeqError: transformers is missing or does not load the whole model.
    """
    require("Hessian traces", ("transformers",), "calibrate")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Fused attention has no second derivative. The experts' plain loop has one everywhere; the default has one only in
    # some versions of torch, with the same values.
    plain = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        network, report = load(model.folder, **plain, device_map=device, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise cannot_load(model.folder, error) from None
    if report["missing_keys"]:  # transformers fills them at random
        raise CheckpointError(f"{model.folder}: expected the weights {sorted(report['missing_keys'])}, found none")
    made: torch.nn.Module = network.eval().requires_grad_(False)
    return made


def expert_parameters(network: torch.nn.Module, model: SourceModel, layout: Layout) -> list[torch.nn.Parameter]:
    """Return the experts' parameters, :data:`PARTS` of each layer in turn, and make them require gradients.

    Raises:
        ConfigError: transformers has other parameters for the experts.
    """
    path = (row := architecture_of(model)).module_name(row.experts)
    base: Any = network.base_model
    found = []
    for layer in layout.layers:
        named = base.layers[layer.index].get_submodule(path).named_parameters()
        parameters = {name: parameter for name, parameter in named if not name.endswith("bias")}
        if set(parameters) != set(PARTS):
            raise ConfigError(f"{layer.prefix}: expected transformers' {list(PARTS)}, found {list(parameters)}")
        found += [parameters[name].requires_grad_() for name in PARTS]
    return found


def check_memory(model: SourceModel, layout: Layout, device: torch.device) -> None:
    """Check that a model's weights and three copies of its experts fit into memory, all in float32.

    Raises:
        UsageError: they do not fit.
    """
    weights = sum(math.prod(info.shape) for info in model.shards.tensors.values())
    experts = sum(layer.num_experts * layer.weights_per_expert for layer in layout.layers)
    needed, available = 4 * (weights + EXPERT_COPIES * experts), available_bytes(device)
    if needed > available:
        raise UsageError(
            f"{model.folder}: the Hessian's traces need the whole model in float32 and three copies of its experts, "
            f"{needed / 2**30:.1f} GiB, and room for activations; {device.type} has {available / 2**30:.1f} GiB"
        )


def perturbations(
    model: SourceModel, layout: Layout, widths: Sequence[int], progress: Progress, device: torch.device = CPU
) -> dict[str, dict[int, dict[str, float]]]:
    """Measure the squared change of the expert weights under rounding to nearest (one bit: the sign).

    The groups have 128 weights, or fewer if 128 does not divide the matrices. One expert is in memory at a time, in
    float32.

    Returns:
        Experts prefix → width in bits → part → Σ over the layer's experts of ‖Q(W) − W‖².

    Raises:
        CheckpointError: a tensor cannot be read or is not finite.
    """
    found = {layer.prefix: {bits: dict.fromkeys(PARTS.values(), 0.0) for bits in widths} for layer in layout.layers}
    experts = [(layer, expert) for layer in layout.layers for expert in range(layer.num_experts)]
    for layer, expert in progress.track(experts, "rounding experts"):
        exact = load_expert(model, layer, expert, device, torch.float32)
        for bits, sums in found[layer.prefix].items():
            pairs = zip(rounded(exact, bits).matrices(), exact.matrices(), strict=True)
            *first, down = (float((one - other).square_().sum(dtype=torch.float64)) for one, other in pairs)
            sums["gate_up"] += sum(first)
            sums["down"] += down
    return found


def hessian_costs(
    traces: Mapping[str, LayerTrace], changes: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> dict[str, dict[int, float]]:
    """Return Ω of HAWQ-v2: experts prefix → width → Σ over parts of mean trace · ``changes`` (:func:`perturbations`).

    A negative trace comes from noise or from a loss that is not convex. It counts as 0, because it would reward the
    fewest bits.
    """
    found: dict[str, dict[int, float]] = {}
    for prefix, of_widths in changes.items():
        weights = {part: max(trace, 0.0) for part, trace in traces[prefix].parts.items()}
        found[prefix] = {
            bits: sum(weights[part] * change for part, change in parts.items()) for bits, parts in of_widths.items()
        }
    return found
