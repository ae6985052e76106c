"""The names of routers and experts in architectures that are known by heart, one table row per ``model_type``.

All others are recognized by transformers' classes (``recognize.py``). A row is for what a class does not say, or for a
model that many serve: then planning and quantizing need no transformers. A test compares such rows with the classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_moeq.format import Projections

_W123 = Projections(gate="w1", up="w3", down="w2")
_GATE_UP_DOWN = Projections(gate="gate_proj", up="up_proj", down="down_proj")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of consecutive layers.

    Attributes:
        layers: name of the list of layers.
        count: keys of config.json; the first one present gives the number of layers.
        inside: prefix of the MoE block's names within a layer.
        length: number of layers where it is known without config.json; ``count`` is not read then.
    """

    layers: str = "model.layers"
    count: tuple[str, ...] = ("num_hidden_layers",)
    inside: str = ""
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Storage of all experts of a layer in two tensors. Names are relative to the layer.

    Attributes:
        gate_up: name of the tensor [experts, gate and up, hidden].
        down: name of the tensor [experts, hidden, intermediate].
        transposed: whether the last two dimensions are exchanged.
        interleaved: whether rows of gate and up alternate; otherwise all rows of gate come first.
    """

    gate_up: str
    down: str
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table. Names are relative to a layer.

    Attributes:
        router: name of the router's weight [experts, hidden].
        experts: prefix of the experts' names, here and in vLLM.
        projections: names of an expert's matrices in the output.
        expert: pattern of an expert's part of the names in the source.
        fused: storage of all experts of a layer in one tensor per projection; None for one tensor per expert.
        stacks: lists of layers.
        renamed: pairs (name in transformers, name in the checkpoint) of modules whose names differ; the first match
            counts.
        kept: name suffixes of matrices that are not quantized, besides routers, because vLLM does not quantize them.
        uncalibrated: reason why the model cannot run layer by layer over a text, or None.
        unserved: reason why vLLM cannot serve the quantized model, or None.
        unloaded: reason why transformers cannot load the quantized model, or None.
        num_experts: number of experts of a layer where it is known without config.json.
        recognized: how the model was recognized, in one line; None for a row of the table.
    """

    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts"
    projections: Projections = _GATE_UP_DOWN
    expert: str = "{}"
    fused: Fused | None = None
    stacks: tuple[Stack, ...] = (Stack(),)
    renamed: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    uncalibrated: str | None = None
    unserved: str | None = None
    unloaded: str | None = None
    num_experts: int | None = None
    recognized: str | None = None

    def module_name(self, name: str) -> str:
        """Return transformers' name for a module or parameter of the checkpoint; both are relative to a layer."""
        for module, saved in self.renamed:
            if f"{name}.".startswith(f"{saved}."):
                return module + name[len(saved) :]
        return name

    def saved_name(self, name: str) -> str:
        """Return the checkpoint's name for a module or parameter of transformers; both are relative to a layer."""
        for module, saved in self.renamed:
            if f"{name}.".startswith(f"{module}."):
                return saved + name[len(module) :]
        return name

    def published_name(self, name: str) -> str:
        """Return the name that a published model has for a tensor of transformers' own layout.

        Args:
            name: full name of a stored tensor; names outside layers are the same in both.
        """
        owner = self.owner(name)
        if owner is None:
            return name
        start = f"{self.stacks[owner[0]].layers}.{owner[1]}."
        inside = name.removeprefix(start)
        return start + self.saved_name(inside) if self.module_name(inside) == inside else name

    def own_layout(self, names: Iterable[str]) -> bool:
        """Tell by the names of stored tensors whether transformers 5 wrote them in its own layout."""
        fused = f".{self.module_name(self.experts)}.gate_up_proj"
        return bool(self.renamed) and any(name.endswith(fused) for name in names)

    def fusions(self) -> tuple[Fused, ...]:
        """Return the forms of a layer whose experts share tensors: the published one, and transformers' own."""
        own = Fused(gate_up=f"{self.experts}.gate_up_proj", down=f"{self.experts}.down_proj")
        if self.fused is None:
            return (own,)
        return (self.fused,) if self.fused.gate_up == own.gate_up else (self.fused, own)

    def checkpoint_name(self, layer: int, name: str) -> str:
        """Return the full checkpoint name of a parameter that transformers calls ``name`` within a decoder layer."""
        return f"{self.stacks[0].layers}.{layer}.{self.saved_name(name)}"

    def router_name(self, layer: int) -> str:
        """Return the full checkpoint name of the router's weight in a decoder layer."""
        return f"{self.stacks[0].layers}.{layer}.{self.stacks[0].inside}{self.router}"

    def prefix(self, layer: int) -> str:
        """Return the prefix of the experts' full names in a decoder layer."""
        return f"{self.stacks[0].layers}.{layer}.{self.stacks[0].inside}{self.experts}"

    def owner(self, name: str) -> tuple[int, int] | None:
        """Return the index of a tensor's stack and of its layer within the stack; None for a tensor outside layers."""
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
    ),
    # Transformers does not mark the experts of Llama-4 and Switch, which are called in other ways.
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
        unserved="vLLM's own loader of its weights takes no tensors of single experts",
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
"""``model_type`` in config.json → row."""

EMBEDDINGS = ("lm_head.weight", "embed_tokens.weight")
"""Name suffixes of the embedding and head weights; sizes list them separately."""
