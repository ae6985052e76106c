"""A transformers model that loads its decoder layers from the checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from planner.common.install import require
from planner.model.layout import Layout, architecture_of
from planner.model.source import SourceModel
from vllm_moeq.format import CheckpointError, ConfigError, UsageError

LayerCall = Callable[[torch.Tensor], torch.Tensor]
"""A layer's input [sequences, length, hidden] → its output, of the same shape."""

ROWS = 8192
"""Number of tokens that pass through a layer, or an expert, at a time."""


class StopReadingError(Exception):
    """Ends a forward pass when its rest is not needed."""


class _Recorder(torch.nn.Module):
    """Stands in for a decoder layer and records its arguments."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Return the input; in the last layer, end the forward pass instead."""
        self.hidden, self.arguments = hidden, arguments
        if self.last:
            raise StopReadingError
        return hidden


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for reading calibration text: float32 on CPUs, where it costs little, bfloat16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class Decoder:
    """A causal language model of transformers' modules, whose parameters have no storage until they are needed.

    Args:
        model: the checkpoint.
        layout: the model's MoE layers.
        device: device that runs the layers.
        dtype: dtype of weights and hidden states.
        rows: maximum number of tokens that pass through a layer at a time; a longer sequence passes alone.

    Raises:
        MoeqError: the model cannot be calibrated, or transformers does not load it.
    """

    def __init__(
        self, model: SourceModel, layout: Layout, device: torch.device, dtype: torch.dtype, rows: int = ROWS
    ) -> None:
        self.row = architecture_of(model)
        if self.row.uncalibrated is not None:
            raise UsageError(
                f"{model.folder}: {layout.model_type} cannot be calibrated: {self.row.uncalibrated}; "
                "expected a method and a quantizer that read no text, such as router-norm-maxvar and hqq"
            )
        require("a model that reads a text", ("transformers", "accelerate"), "calibrate")
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        from vllm_moeq.hf.contract import require_silu

        try:
            self.config = AutoConfig.from_pretrained(model.folder)
            with init_empty_weights(include_buffers=False):
                skeleton = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{model.folder}: transformers cannot load it ({error})") from None
        self.model, self.layout, self.device, self.dtype, self.rows = model, layout, device, dtype, rows
        self.moe = {layer.index: layer for layer in layout.layers}
        self.base = skeleton.eval().base_model
        self.lm_head: torch.nn.Module = skeleton.get_output_embeddings()
        self.layers: torch.nn.ModuleList = self.base.layers
        self.activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.silu
        for layer in layout.layers:
            experts = self.layers[layer.index].get_submodule(self.row.module_name(self.row.experts))
            require_silu(f"{model.folder}: {layer.prefix}", experts)
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self.base.rotary_emb.to(device)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(self.config.vocab_size)

    @property
    def logits_place(self) -> int:
        """Index of the logits of all experts among the outputs of a router; transformers' versions differ in it."""
        return int(self.base._can_record_outputs["router_logits"].index)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first layer's input [sequences, length, hidden] for tokens [sequences, length].

        The model's other arguments to its layers (rotary embeddings, masks) are kept for :meth:`layer`; they depend
        only on the shape.
        """
        recorders = [_Recorder(last=index + 1 == len(self)) for index in range(len(self))]
        embedding = self.base.get_input_embeddings()
        names = {id(module): name for name, module in self.base.named_modules()}
        prefix = f"model.{names[id(embedding)]}"
        self._fill(embedding, lambda name: f"{prefix}.{name}", {})
        self.base.layers = torch.nn.ModuleList(recorders)
        try:
            self.base(input_ids=tokens.to(self.device), use_cache=False)
        except StopReadingError:
            pass
        finally:
            self.base.layers = self.layers
            embedding.to("meta")
        self._arguments[tokens.shape[0]] = [recorder.arguments for recorder in recorders]
        return recorders[0].hidden

    @contextmanager
    def layer(
        self,
        index: int,
        experts: torch.nn.Module | None = None,
        replaced: Mapping[str, torch.Tensor] | None = None,
        differentiable: bool = False,
    ) -> Iterator[LayerCall]:
        """Load one layer without its routed experts, and yield a function that runs it.

        Args:
            index: the layer's index.
            experts: module in place of the routed experts; it is called with hidden states [tokens, hidden], expert ids
                [tokens, k] and weights [tokens, k].
            replaced: weights to use instead of the checkpoint's for some of the layer's tensors, by checkpoint name.
            differentiable: whether the function can be differentiated with respect to its input.

        Raises:
            CheckpointError: a tensor that transformers expects is missing or has another shape.
        """
        layer = self.layers[index]
        path = self.row.module_name(self.row.experts) if index in self.moe else None
        if path is not None:
            if experts is None:
                raise ValueError(f"layer {index} has routed experts")
            original = layer.get_submodule(path)
            layer.set_submodule(path, experts)
        skip = set() if experts is None else {id(parameter) for parameter in experts.parameters()}
        try:
            self._fill(layer, lambda name: self.row.checkpoint_name(index, name), replaced or {}, skip)

            def call(hidden: torch.Tensor) -> torch.Tensor:
                if hidden.shape[0] not in self._arguments:
                    self.embed(torch.zeros(hidden.shape[:2], dtype=torch.int64))
                arguments = self._arguments[hidden.shape[0]][index]
                result = layer(hidden.to(self.device, self.dtype), **arguments)
                states: torch.Tensor = result[0] if isinstance(result, tuple) else result
                return states

            with torch.enable_grad() if differentiable else torch.no_grad():
                yield call
        finally:
            if path is not None:
                layer.set_submodule(path, original)
            layer.to("meta")

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load the last norm and the output projection, and yield a function from the last layer's output to logits.

        Raises:
            CheckpointError: a tensor that transformers expects is missing or has another shape.
        """
        embedding = next(name for name, found in self.base.named_modules() if found is self.base.get_input_embeddings())
        tied = "lm_head.weight" not in self.model.shards.tensors
        weight = f"model.{embedding}.weight" if tied else "lm_head.weight"
        try:
            self._fill(self.base.norm, lambda name: f"model.norm.{name}", {})
            self._fill(self.lm_head, lambda name: weight if name == "weight" else f"lm_head.{name}", {})
            divisor = getattr(self.config, "logits_scaling", 1.0)  # Granite has it
            yield lambda hidden: self.lm_head(self.base.norm(hidden.to(self.device, self.dtype))).float() / divisor
        finally:
            self.base.norm.to("meta")
            self.lm_head.to("meta")

    def router(self, index: int) -> torch.nn.Module:
        """Return a layer's router module."""
        return self.layers[index].get_submodule(self.row.module_name(self.row.router).removesuffix(".weight"))

    def _fill(
        self,
        module: torch.nn.Module,
        checkpoint_name: Callable[[str], str],
        replaced: Mapping[str, torch.Tensor],
        skip: set[int] | None = None,
    ) -> None:
        """Load the weights of a module's parameters and persistent buffers."""
        for name, tensor in module.state_dict(keep_vars=True).items():
            if skip and id(tensor) in skip:
                continue
            source = checkpoint_name(name)
            value = replaced[source] if source in replaced else self.model.shards.map(source)
            if value.shape != tensor.shape:
                raise CheckpointError(
                    f"{self.model.folder}: tensor {source}: expected {list(tensor.shape)}, found {list(value.shape)}"
                )
            owner, _, leaf = name.rpartition(".")
            place = module.get_submodule(owner)
            value = value.to(self.device, self.dtype if value.dtype.is_floating_point else None)
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=False)
            setattr(place, leaf, value)
