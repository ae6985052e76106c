"""Build a model of transformers' modules without weights, and find its list of decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from planner.common.install import require
from planner.model.architectures import Architecture
from planner.model.layout import Layout
from planner.model.source import CONFIG, SourceModel
from vllm_moeq.completeness import cannot_build, no_class, parse_config, silence
from vllm_moeq.format import ConfigError, MoeqError, UsageError
from vllm_moeq.kernels import Activation


@dataclass(frozen=True)
class Network:
    """A model whose parameters have no storage.

    Attributes:
        whole: transformers' model, with its head.
        path: name of the list of decoder layers in it.
        activation: what its experts compute between their projections.
    """

    whole: Any
    path: str
    activation: Activation

    @property
    def base(self) -> Any:
        """The module that runs the layers: embedding, layers, norm."""
        return self.whole.get_submodule(self.path.rpartition(".")[0])

    @property
    def attribute(self) -> str:
        """Name of the list within :attr:`base`."""
        return self.path.rpartition(".")[2]

    @property
    def text_config(self) -> Any:
        """The config of the language model, which may be a part of the model's."""
        return self.whole.config.get_text_config()


def build_network(model: SourceModel, layout: Layout, row: Architecture, dtype: torch.dtype) -> Network:
    """Return transformers' model of a checkpoint, with buffers but without parameters.

    Raises:
        MoeqError: it has experts that cannot be computed here, transformers has no class, or a package is missing.
    """
    if row.uncalibrated is not None:
        raise UsageError(
            f"{model.folder}: {layout.model_type} cannot be calibrated: {row.uncalibrated}; "
            "expected a method and a quantizer that read no text, such as router-norm-maxvar and hqq"
        )
    require("a model that reads a text", ("transformers", "accelerate"), "calibrate")
    from accelerate import init_empty_weights

    reason = no_class(model.config)
    if reason is not None:
        raise ConfigError(f"{model.folder}: transformers cannot load it ({reason})")
    path = model.folder / CONFIG
    try:
        with silence():
            config, kind = parse_config(model.config, path)
            # Losses of the router would want what no stand-in returns.
            for part in (config, config.get_text_config()):
                if getattr(part, "output_router_logits", False):
                    part.output_router_logits = False
            with init_empty_weights(include_buffers=False):
                whole = kind._from_config(config, dtype=dtype).eval()
    except MoeqError:
        raise
    except Exception as error:  # the config may hold anything, and transformers raises whatever it meets first
        raise cannot_build(path, error) from None
    layers = _find_layers(whole, layout, row, model)
    return Network(whole, layers, _activation(whole.get_submodule(layers), layout, row, model))


def _activation(layers: Any, layout: Layout, row: Architecture, model: SourceModel) -> Activation:
    """Return what the experts of all layers compute.

    Raises:
        UsageError: it is nothing that our kernels compute, or not the same in all layers.
    """
    from vllm_moeq.hf.contract import require_computed

    found: dict[Activation, str] = {}
    for layer in layout.layers:
        experts = layers[layer.index].get_submodule(row.module_name(row.experts))
        found.setdefault(require_computed(f"{model.folder}: {layer.prefix}", experts), layer.prefix)
    if len(found) != 1:
        (first, _), (other, place) = list(found.items())[:2]
        raise UsageError(f"{model.folder}: {place}: expected {first}, as in the layers before, found {other}")
    return next(iter(found))


def _find_layers(whole: Any, layout: Layout, row: Architecture, model: SourceModel) -> str:
    """Return the name of the list of decoder layers: the one that has the experts where the checkpoint has them.

    Raises:
        ConfigError: there is none.
    """
    experts = row.module_name(row.experts)
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(layout.blocks):
            try:
                for layer in layout.layers:
                    module[layer.index].get_submodule(experts)
            except AttributeError:
                continue
            return str(name)
    raise ConfigError(
        f"{model.folder}: transformers' {type(whole).__name__}: expected {len(layout.blocks)} layers with {experts}, "
        "found none"
    )
