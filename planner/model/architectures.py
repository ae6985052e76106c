"""Where each architecture keeps its routers and experts: one table row each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_moeq.format import Projections, UsageError

_W123 = Projections(gate="w1", up="w3", down="w2")
_GATE_UP_DOWN = Projections(gate="gate_proj", up="up_proj", down="down_proj")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A run of layers.

    Attributes:
        layers: name of the list of layers.
        count: keys of config.json, the first that is there says how many.
        inside: where in a layer the names of its MoE block begin.
    """

    layers: str = "model.layers"
    count: tuple[str, ...] = ("num_hidden_layers",)
    inside: str = ""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """All experts of a layer in two tensors, names relative to the layer.

    Attributes:
        gate_up: [experts, gate and up, hidden].
        down: [experts, hidden, intermediate].
        transposed: the last two dimensions are exchanged.
        interleaved: rows of gate and up alternate, instead of gate's half first.
    """

    gate_up: str
    down: str
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row; names are relative to a layer.

    Attributes:
        router: the router's weight [experts, hidden].
        experts: what the names of experts begin with, here and in vLLM.
        projections: the matrices of an expert, as the output names them.
        expert: an expert's part of the names in the source.
        fused: where the source has all experts of a layer in one tensor.
        stacks: where layers are.
        renamed: (name in transformers, name in the checkpoint) of modules that differ; the first that fits.
        kept: ends of names of matrices that stay as they are besides routers: what vLLM does not quantize.
        logits: which of the outputs of transformers' router are the logits of all experts.
        uncalibrated: why the model cannot run layer by layer over a text, or None.
        unserved: why vLLM cannot serve the quantized model, or None.
    """

    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts"
    projections: Projections = _GATE_UP_DOWN
    expert: str = "{}"
    fused: Fused | None = None
    stacks: tuple[Stack, ...] = (Stack(),)
    renamed: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    logits: int = 0
    uncalibrated: str | None = None
    unserved: str | None = None

    def module_name(self, name: str) -> str:
        """Name in transformers of a module or parameter within a layer of the checkpoint."""
        for module, saved in self.renamed:
            if f"{name}.".startswith(f"{saved}."):
                return module + name[len(saved) :]
        return name

    def saved_name(self, name: str) -> str:
        """Name in the checkpoint of a module or parameter that transformers calls ``name`` within a layer."""
        for module, saved in self.renamed:
            if f"{name}.".startswith(f"{module}."):
                return saved + name[len(module) :]
        return name

    def checkpoint_name(self, layer: int, name: str) -> str:
        """Checkpoint name of a parameter that transformers calls ``name`` within a layer of a decoder."""
        return f"{self.stacks[0].layers}.{layer}.{self.saved_name(name)}"

    def router_name(self, layer: int) -> str:
        """Checkpoint name of the weight of a decoder layer's router."""
        return f"{self.stacks[0].layers}.{layer}.{self.stacks[0].inside}{self.router}"

    def prefix(self, layer: int) -> str:
        """What the names of the experts of a decoder's layer begin with."""
        return f"{self.stacks[0].layers}.{layer}.{self.stacks[0].inside}{self.experts}"

    def owner(self, name: str) -> tuple[int, int] | None:
        """Return which stack, and which of its layers, a tensor belongs to."""
        for number, stack in enumerate(self.stacks):
            found = re.match(rf"{re.escape(stack.layers)}\.(0|[1-9][0-9]{{0,5}})\.", name)
            if found is not None:
                return number, int(found[1])
        return None


_BLOCK = ("mlp", "block_sparse_moe")
_DENSE_SUM = "transformers runs all its experts on all tokens at once"

_QWEN = Architecture()
_SHARED_GATE = Architecture(kept=("mlp.shared_expert_gate.weight",))

ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": Architecture(
        router="block_sparse_moe.gate.weight",
        experts="block_sparse_moe.experts",
        projections=_W123,
        renamed=(_BLOCK,),
    ),
    "phimoe": Architecture(
        router="block_sparse_moe.gate.weight",
        experts="block_sparse_moe.experts",
        projections=_W123,
        renamed=(("mlp.router", "block_sparse_moe.gate"), _BLOCK),
    ),
    "minimax_m2": Architecture(
        router="block_sparse_moe.gate.weight",
        experts="block_sparse_moe.experts",
        projections=_W123,
        renamed=(_BLOCK,),
    ),
    "qwen2_moe": _SHARED_GATE,
    "qwen3_moe": _QWEN,
    "qwen3_next": _SHARED_GATE,
    "olmoe": _QWEN,
    "deepseek_v2": _QWEN,
    "deepseek_v3": _QWEN,
    "glm4_moe": _QWEN,
    "ernie4_5_moe": Architecture(renamed=(("mlp.gate.moe_statics", "mlp.moe_statics"),)),
    "granitemoe": Architecture(
        router="block_sparse_moe.router.layer.weight",
        experts="block_sparse_moe.experts",
        fused=Fused(gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"),
        renamed=(("block_sparse_moe.router", "block_sparse_moe.router.layer"),),
        logits=2,
    ),
    "llama4": Architecture(
        router="feed_forward.router.weight",
        experts="feed_forward.experts",
        fused=Fused(
            gate_up="feed_forward.experts.gate_up_proj", down="feed_forward.experts.down_proj", transposed=True
        ),
        stacks=(Stack(layers="language_model.model.layers"),),
        uncalibrated=_DENSE_SUM,
    ),
    "llama4_text": Architecture(
        router="feed_forward.router.weight",
        experts="feed_forward.experts",
        fused=Fused(
            gate_up="feed_forward.experts.gate_up_proj", down="feed_forward.experts.down_proj", transposed=True
        ),
        uncalibrated=_DENSE_SUM,
    ),
    "gpt_oss": Architecture(
        router="mlp.router.weight",
        fused=Fused(
            gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj", transposed=True, interleaved=True
        ),
        uncalibrated="its experts have biases and another activation than SiLU",
        unserved="its experts have biases and another activation than SiLU",
    ),
    "switch_transformers": Architecture(
        router="mlp.router.classifier.weight",
        projections=Projections(gate="wi", down="wo"),
        expert="expert_{}",
        stacks=(
            Stack(layers="encoder.block", count=("num_layers",), inside="layer.1."),
            Stack(layers="decoder.block", count=("num_decoder_layers", "num_layers"), inside="layer.2."),
        ),
        kept=("relative_attention_bias.weight",),
        uncalibrated="it has an encoder and a decoder",
        unserved="vLLM has no encoder-decoder of the T5 family",
    ),
}
"""``model_type`` of config.json → row."""

EMBEDDINGS = ("lm_head.weight", "embed_tokens.weight")
"""Weights outside the layers that a size is told for by themselves."""


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return the row of a config.json, if there is one."""
    model_type = config.get("model_type")
    return ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None


def architecture_for(config: Mapping[str, Any], folder: Path, tensors: Iterable[str]) -> Architecture:
    """Return the table row of a model.

    Raises:
        UsageError: an unknown ``model_type``; names the tensors that look like experts.
    """
    row = find_architecture(config)
    if row is not None:
        return row
    looks = sorted({re.sub(r"(?<=[._])\d+(?=\.)", "N", name) for name in tensors if "expert" in name.lower()})
    found = ", ".join(looks[:6]) or "none"
    raise UsageError(
        f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not supported "
        f"(supported: {', '.join(sorted(ARCHITECTURES))}); tensors that look like experts: {found}"
    )
