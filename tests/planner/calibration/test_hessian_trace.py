"""Traces of the Hessian: against exact second derivatives, finite differences, and in sums of costs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from planner.calibration import hessian_trace
from planner.calibration.hessian_trace import (
    CPU,
    LayerTrace,
    expert_parameters,
    hessian_costs,
    hessian_product,
    layer_traces,
    load_network,
    perturbations,
    summed_loss,
)
from planner.calibration.reading.expert import load_expert
from planner.common.progress import Progress
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantize_rtn, quantize_sign
from vllm_moeq.format import CheckpointError, ConfigError, UsageError

QUIET = Progress(quiet=True)
PREFIXES = [f"model.layers.{index}.block_sparse_moe.experts" for index in range(2)]


def save_model(folder: Path, hidden: int, intermediate: int) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 32}
    # Weights far larger than at the start of training: experts then curve the loss.
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.4))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("hessian") / "tiny", 32, 32)


@pytest.fixture(scope="module")
def tinier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough for second derivatives in every weight."""
    return save_model(tmp_path_factory.mktemp("hessian") / "tinier", 8, 6)


@pytest.fixture
def model(tiny: Path) -> Iterator[SourceModel]:
    with SourceModel(tiny) as model:
        yield model


def some_tokens(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 32, (sequences, length), generator=torch.Generator().manual_seed(1))


def exact_trace(network: torch.nn.Module, name: str, tokens: torch.Tensor) -> float:
    """The trace of the Hessian in one parameter: all of its second derivatives, by torch."""

    def loss(weights: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(network, {name: weights}, kwargs={"input_ids": tokens}).logits
        chosen = logits[:, :-1].log_softmax(dim=-1).gather(2, tokens[:, 1:, None])
        return -chosen.mean()

    weights = network.get_parameter(name).detach()
    hessian = torch.autograd.functional.hessian(loss, weights, vectorize=True)
    assert isinstance(hessian, torch.Tensor)
    return float(hessian.reshape(weights.numel(), -1).trace())


def test_estimates_agree_with_exact_traces(tinier: Path) -> None:
    tokens = some_tokens(16, 12)
    with SourceModel(tinier) as model:
        found = layer_traces(model, read_layout(model), tokens, CPU, QUIET, probes=300, batch=9)
        network = load_network(model, CPU)
    # Errors of that size would not hide an estimate of other weights, or of a sum instead of a mean.
    for index, (prefix, largest) in enumerate(zip(PREFIXES, (0.2, 0.5), strict=True)):
        trace, total, count = found[prefix], 0.0, 0
        for name, part in hessian_trace.PARTS.items():
            full = f"model.layers.{index}.mlp.experts.{name}"
            exact, weights = exact_trace(network, full, tokens), network.get_parameter(full).numel()
            assert abs(trace.parts[part] - exact / weights) < 3 * trace.part_errors[part]
            assert trace.part_errors[part] < largest * abs(exact / weights)
            total, count = total + exact, count + weights
        assert abs(trace.mean - total / count) < 3 * trace.error
        assert trace.error < largest * abs(total / count)


def test_products_agree_with_finite_differences(model: SourceModel) -> None:
    tokens = some_tokens(2, 8)
    network = load_network(model, CPU).double()
    parameters = expert_parameters(network, model, read_layout(model))
    generator = torch.Generator().manual_seed(2)
    vectors = [torch.randn(each.shape, dtype=torch.float64, generator=generator) for each in parameters]
    gradients = torch.autograd.grad(summed_loss(network, tokens), parameters, create_graph=True)
    products = hessian_product(gradients, parameters, vectors)

    def gradients_at(step: float) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            for parameter, vector in zip(parameters, vectors, strict=True):
                parameter.add_(vector, alpha=step)
        found = torch.autograd.grad(summed_loss(network, tokens), parameters)
        with torch.no_grad():
            for parameter, vector in zip(parameters, vectors, strict=True):
                parameter.sub_(vector, alpha=step)
        return found

    step = 1e-4  # not less: transformers' norms are in float32 in any case
    after, before = gradients_at(step), gradients_at(-step)
    for product, high, low in zip(products, after, before, strict=True):
        difference = (high - low) / (2 * step)
        assert float((product - difference).norm()) < 1e-3 * float(product.norm())


def test_a_seed_gives_the_same_traces(model: SourceModel) -> None:
    tokens, layout = some_tokens(2, 8), read_layout(model)
    with torch.inference_mode():  # as calibration runs
        first, again, other = (
            layer_traces(model, layout, tokens, CPU, QUIET, probes=2, seed=seed, batch=2) for seed in (0, 0, 1)
        )
    assert first == again
    assert first != other
    assert list(first) == PREFIXES


def test_more_than_the_memory_is_refused(model: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = read_layout(model)
    weights = sum(math.prod(info.shape) for info in model.shards.tensors.values())
    needed = 4 * weights + 3 * 4 * 2 * 2 * 3 * 32 * 32
    monkeypatch.setattr(hessian_trace, "available_bytes", lambda _device: needed - 1)
    monkeypatch.setattr(hessian_trace, "load_network", lambda *_: pytest.fail("loaded"))
    size = f"{needed / 2**30:.1f} GiB"
    with pytest.raises(UsageError, match=f"three copies of its experts, {size}.*cpu has {size}"):
        layer_traces(model, layout, some_tokens(1, 8), CPU, QUIET)
    monkeypatch.setattr(hessian_trace, "available_bytes", lambda _device: needed)
    hessian_trace.check_memory(model, layout, CPU)


def test_available_memory_is_some() -> None:
    assert 2**26 < hessian_trace.available_bytes(CPU) < 2**60


@pytest.mark.parametrize(("sequences", "length", "probes"), [(1, 8, 1), (1, 1, 2), (0, 8, 2)])
def test_nothing_to_estimate(model: SourceModel, sequences: int, length: int, probes: int) -> None:
    with pytest.raises(ValueError, match="expected probes >= 2 and tokens"):
        layer_traces(model, read_layout(model), some_tokens(sequences, length), CPU, QUIET, probes=probes)


def test_damaged_models_are_refused(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "model"))
    config, tensors = json.loads((tiny / "config.json").read_text()), load_file(tiny / "model.safetensors")

    def refusal() -> str:
        with SourceModel(copy) as model, pytest.raises((CheckpointError, ConfigError)) as error:
            layer_traces(model, read_layout(model), some_tokens(1, 8), CPU, QUIET, probes=2)
        return str(error.value)

    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    assert "transformers cannot load it" in refusal()
    (copy / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "model.norm.weight": torch.full((32,), math.nan)}, copy / "model.safetensors")
    assert "expected a finite Hessian" in refusal()
    kept = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    assert "expected the weights ['model.norm.weight'], found none" in refusal()


def test_perturbations_are_those_of_the_quantizers(model: SourceModel) -> None:
    layout = read_layout(model)
    found = perturbations(model, layout, (1, 2, 4), QUIET)
    for layer in layout.layers:
        for bits, quantize in ((1, quantize_sign), (2, quantize_rtn), (4, quantize_rtn)):
            expected = {"gate_up": 0.0, "down": 0.0}
            for expert in range(2):
                matrices = load_expert(model, layer, expert, CPU, torch.float32).matrices()
                for part, weight in zip(("gate_up", "gate_up", "down"), matrices, strict=True):
                    expected[part] += float((quantize(weight, bits, 32).dequantize() - weight).square().sum())
            assert found[layer.prefix][bits] == pytest.approx(expected, rel=1e-5)
        errors = [found[layer.prefix][bits]["down"] for bits in (1, 2, 4)]
        assert errors == sorted(errors, reverse=True)


def test_costs_are_sums_over_parts_without_negative_traces() -> None:
    trace = LayerTrace(1.0, 0.1, {"gate_up": 2.0, "down": -3.0}, {"gate_up": 0.1, "down": 0.1})
    traces = {"a": trace, "b": replace(trace, parts={"gate_up": 0.5, "down": 4.0})}
    changes = {prefix: {2: {"gate_up": 10.0, "down": 1.0}, 3: {"gate_up": 1.0, "down": 0.5}} for prefix in traces}
    assert hessian_costs(traces, changes) == {"a": {2: 20.0, 3: 2.0}, "b": {2: 9.0, 3: 2.5}}
