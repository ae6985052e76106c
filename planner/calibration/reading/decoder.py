"""A transformers model that loads its decoder layers from the checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from planner.calibration.reading.boundary import LayerStub, in_any_form, same
from planner.calibration.reading.network import build_network
from planner.calibration.reading.replay import StoredOutputs
from planner.calibration.reading.weights import Weights
from planner.model.layout import Layout, architecture_of
from planner.model.source import SourceModel
from vllm_moeq.format import MoeqError, UsageError

LayerCall = Callable[[torch.Tensor], torch.Tensor]
"""A layer's input [sequences, length, hidden] → its output, of the same shape."""

ROWS = 8192
"""Number of tokens that pass through a layer, or an expert, at a time."""


class StopReadingError(Exception):
    """Ends a forward pass when its rest is not needed."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for reading calibration text: float32 on CPUs, where it costs little, bfloat16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class Decoder:
    """A language model of transformers' modules, whose parameters have no storage until they are needed.

    The model may have parts for images besides: they are never run.

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
        self.network = build_network(model, layout, self.row, dtype)
        self.config = self.network.text_config
        self.model, self.layout, self.device, self.dtype, self.rows = model, layout, device, dtype, rows
        self.moe = {layer.index: layer for layer in layout.layers}
        self.layers: torch.nn.ModuleList = self.network.whole.get_submodule(self.network.path)
        self.lm_head: torch.nn.Module = self.network.whole.get_output_embeddings()
        self.activation = self.network.activation
        self._weights = Weights(model, self.network.whole, device, dtype)
        self._arguments: dict[int, list[LayerStub]] = {}
        self._norm: str | None = None
        for name, buffer in self.network.base.named_buffers():
            if not buffer.is_meta:
                owner, _, leaf = name.rpartition(".")
                self.network.base.get_submodule(owner)._buffers[leaf] = buffer.to(device)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(self.config.vocab_size)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first layer's input [sequences, length, hidden] for tokens [sequences, length].

        The model's other arguments to its layers (rotary embeddings, masks) are kept for :meth:`layer`; they depend
        only on the shape.

        Raises:
            UsageError: they depend on the tokens too, or the model's hidden states are no vectors.
        """
        outside = [module for name, module in self.network.base.named_children() if name != self.network.attribute]
        for module in outside:
            self._weights.fill(module)
        try:
            stubs = self._run(tokens)
            if not self._arguments:
                self._check_width(stubs[0].hidden)
                self._check(stubs, self._run((tokens + 1) % self.vocabulary))
        finally:
            for module in outside:
                self._weights.empty(module)
        self._arguments[tokens.shape[0]] = stubs
        return stubs[0].hidden

    def _run(self, tokens: torch.Tensor) -> list[LayerStub]:
        """Run the model with stubs in place of its layers, and return them; note the norm behind the last one."""
        base, attribute = self.network.base, self.network.attribute

        def run(form: Callable[[torch.Tensor], Any]) -> list[LayerStub]:
            stubs = [LayerStub(layer, form) for layer in self.layers]
            setattr(base, attribute, torch.nn.ModuleList(stubs))
            handles = [
                module.register_forward_hook(note(name)) for name, module in base.named_children() if name != attribute
            ]
            called.clear()
            try:
                found = base(input_ids=tokens.to(self.device), use_cache=False)
            finally:
                setattr(base, attribute, self.layers)
                for handle in handles:
                    handle.remove()
            self._norm = self._find_norm(stubs[-1].hidden, found.last_hidden_state, called)
            return stubs

        called: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def note(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], Any], None]:
            def hook(_module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                    called.append((name, inputs[0], output))

            return hook

        found: list[LayerStub] = in_any_form(run)
        return found

    def _find_norm(
        self, last: torch.Tensor, result: torch.Tensor, called: list[tuple[str, torch.Tensor, torch.Tensor]]
    ) -> str:
        """Return the name of the module between the last layer and the model's output.

        Raises:
            UsageError: no single module is.
        """
        for name, value, output in reversed(called):
            if value.shape == last.shape and torch.equal(value, last) and torch.equal(output, result):
                return name
        raise self._refusal("expected a norm alone behind its last layer, found more")

    def _check_width(self, hidden: torch.Tensor) -> None:
        """Refuse several streams of hidden states, which a token has with hyper-connections."""
        expected = self.config.hidden_size
        if hidden.ndim == 3 and hidden.shape[-1] != expected:
            raise self._refusal(f"expected hidden states of {expected} values, found {hidden.shape[-1]}")

    def _check(self, stubs: list[LayerStub], others: list[LayerStub]) -> None:
        """Refuse layers that read more than hidden states, by their arguments for two texts of one shape."""
        if stubs[0].hidden.ndim != 3:
            raise self._refusal(
                f"expected hidden states [sequences, length, hidden], found {stubs[0].hidden.ndim} dimensions"
            )
        for stub, other in zip(stubs, others, strict=True):
            for key, value in stub.named.items():
                if not same(value, other.named[key]):
                    raise self._refusal(f"expected layers that read hidden states alone, found {key} of the text")
            if not same(stub.positional, other.positional):
                raise self._refusal("expected layers that read hidden states alone, found more of the text")

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(
            f"{self.model.folder}: {self.layout.model_type} cannot be calibrated: transformers' "
            f"{type(self.network.whole).__name__}: {reason}"
        )

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
            self._weights.fill(layer, lambda name: self.row.checkpoint_name(index, name), replaced, skip)

            def call(hidden: torch.Tensor) -> torch.Tensor:
                if hidden.shape[0] not in self._arguments:
                    self.embed(torch.zeros(hidden.shape[:2], dtype=torch.int64))
                stub = self._arguments[hidden.shape[0]][index]
                try:
                    result = layer(hidden.to(self.device, self.dtype), *stub.positional, **stub.named)
                except MoeqError as error:
                    raise self._refusal(str(error)) from None
                states: torch.Tensor = result[0] if isinstance(result, tuple) else result
                return states

            with torch.enable_grad() if differentiable else torch.no_grad():
                yield call
        finally:
            if path is not None:
                layer.set_submodule(path, original)
            self._weights.empty(layer)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load the last norm and the output projection, and yield a function from the last layer's output to logits.

        What comes behind the projection, such as a scale or a cap of the logits, is the model's own code.

        Raises:
            CheckpointError: a tensor that transformers expects is missing or has another shape.
        """
        if self._norm is None:
            self.embed(torch.zeros((1, 1), dtype=torch.int64))
        whole, norm = self.network.whole, self.network.base.get_submodule(self._norm or "")
        place = self.network.path.split(".")[0]
        model, stored = getattr(whole, place), StoredOutputs()

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            stored.states = norm(hidden.to(self.device, self.dtype))[None]
            tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=self.device)
            found: torch.Tensor = whole(input_ids=tokens, use_cache=False).logits[0]
            return found.float()

        try:
            self._weights.fill(norm)
            self._fill_head()
            setattr(whole, place, stored)
            yield logits
        finally:
            setattr(whole, place, model)
            self._weights.empty(norm)
            self._weights.empty(self.lm_head)

    def _fill_head(self) -> None:
        """Load the output projection, which may be the embedding's weight."""
        whole = self.network.whole
        names = {id(module): name for name, module in whole.named_modules()}
        embedding = names[id(whole.get_input_embeddings())]
        self._weights.fill(self.lm_head, tied=embedding)

    def router(self, index: int) -> torch.nn.Module:
        """Return the module that has a layer's router as its weight."""
        return self.layers[index].get_submodule(self.row.module_name(self.row.router).removesuffix(".weight"))
