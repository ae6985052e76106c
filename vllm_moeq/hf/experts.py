"""The modules that replace transformers' experts: one class for each way of calling them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from vllm_moeq.format import CheckpointError, drop_weak
from vllm_moeq.hf.contract import activation_of, gate_of, is_gated, refusal, require_known, require_tensors
from vllm_moeq.hf.layout import StoredLayer
from vllm_moeq.hf.packed import PackedStorage
from vllm_moeq.kernels import (
    FALLBACK,
    SILU,
    TABLE,
    Backend,
    LayerKernel,
    PackedExperts,
    PackedMatrices,
    choose,
    make_layer,
    requested_backend,
)

Gate = Callable[[torch.Tensor], torch.Tensor]
"""A function from the outputs of the first projection, in transformers' order, to the inputs of down."""


class RoutedExperts(PackedStorage):
    """Experts called with tokens, expert indices and routing weights, as in nearly all models.

    Experts whose activation our kernels compute run in them: the fused one on a GPU, the native one on a CPU, the
    reference if the native one cannot be built and for float32 on a GPU. Other experts are dequantized one at a time to
    the activations' dtype, and transformers' own code computes their activation.

    Args:
        layer: the layer in the checkpoint.
        source: transformers' module; its biases are kept, its matrices are dropped.

    Raises:
        CheckpointError: the module's experts do not have as many weights as the checkpoint's.
        UsageError: the module computes something that would be left out; the message names the attribute.
    """

    def __init__(self, layer: StoredLayer, source: torch.nn.Module) -> None:
        super().__init__(layer)
        self._check(source)
        biases = {name: tensor for name, tensor in source.named_parameters() if name.endswith("bias")}
        expected = sum(tensor.numel() for name, tensor in source.named_parameters() if name not in biases)
        if expected != layer.weights:
            raise CheckpointError(
                f"{layer.prefix}: expected {expected} weights of experts as in transformers' {type(source).__name__}, "
                f"found {layer.experts} experts with {layer.weights}"
            )
        for name, tensor in biases.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.interleaved = not getattr(source, "is_concatenated", True)
        self.gate = self._gate(source)
        self.known = activation_of(source, self.gate, layer.projections.up is not None)
        self.fused = self.known is not None
        self._kernel: LayerKernel | None = None
        self._backend: Backend = FALLBACK

    def _check(self, source: torch.nn.Module) -> None:
        """Refuse a module that computes more than this class.

        Raises:
            UsageError: it does; the message names the attribute.
        """
        require_known(self.layer.prefix, source)
        stored, gated = self.layer.projections.up is not None, is_gated(source)
        if stored != gated:
            raise refusal(self.layer.prefix, source, "has_gate", f"{stored}, as in the checkpoint", str(gated))

    def _gate(self, source: Any) -> Gate:
        """Return the function between the projections."""
        return gate_of(source)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return each token's weighted sum over its experts.

        Args:
            hidden: hidden states [tokens, hidden], any float dtype.
            ids: expert indices [tokens, top-k], integers; negative ones are skipped.
            weights: routing weights [tokens, top-k], any float dtype.

        Returns:
            [tokens, hidden] in the dtype of ``hidden``.
        """
        if self.layer.threshold > 0:
            ids, weights = drop_weak(ids, weights, self.layer.threshold)
        return self._fused(hidden, ids, weights) if self.fused else self._one_by_one(hidden, ids, weights)

    def _fused(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self._kernel is None:
            self._kernel = self._make_kernel(hidden.dtype)
        if self._backend.any_call:
            return self._kernel(hidden, weights, ids)
        return self._kernel(hidden.to(self._dtype), weights, ids).to(hidden.dtype)

    def _make_kernel(self, dtype: torch.dtype) -> LayerKernel:
        """Choose a kernel and repack for it; its variants are compiled at their first use."""
        packed = PackedExperts(self.packed("gate_up"), self.packed("down"), self.known or SILU)
        requested = requested_backend()
        if any(row.name == requested and not row.takes(dtype) for row in TABLE):
            requested = FALLBACK.name
        self._backend = choose(packed, requested, dtype).row
        kernel = make_layer(packed, dtype, self._backend.name)
        self._dtype = dtype
        if not self._backend.keeps_loaded:
            self.release()
        return kernel

    def packed(self, part: str) -> PackedMatrices:
        """See :meth:`PackedStorage.packed`; biases are in the order of the stored rows."""
        packed = super().packed(part)
        names = (f"{name}_bias" for name in ("gate_up_proj", "up_proj", "down_proj"))
        for name in (it for it in names if it in self._parameters and it.startswith("down") == (part == "down")):
            bias = self.get_parameter(name).detach()
            if self.interleaved and part == "gate_up":
                bias = bias.unflatten(-1, (-1, 2)).mT.flatten(-2)
            packed.bias = bias.float()
        return packed

    def _one_by_one(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden)
        for expert in torch.unique(ids).tolist():
            if expert >= 0:
                token, slot = torch.nonzero(ids == expert, as_tuple=True)
                output = self._expert(expert, hidden[token]) * weights[token, slot, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return one expert's outputs [tokens, hidden], rounded where transformers rounds."""
        gate_up, down = self.packed("gate_up"), self.packed("down")
        first = gate_up.biased(expert, linear(gate_up.inputs(x), gate_up.dense(expert, x.dtype)))
        if self.interleaved:
            first = torch.stack(first.chunk(2, dim=-1), dim=-1).flatten(-2)
        second = linear(down.inputs(self.gate(first)), down.dense(expert, x.dtype))
        return down.biased(expert, second)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoutedExperts:
        """See :meth:`PackedStorage._apply`; a kernel that computes from the loaded buffers is made anew."""
        super()._apply(fn, recurse)
        if self._backend.keeps_loaded:
            self._kernel = None
        return self


class Llama4Experts(RoutedExperts):
    """Llama-4's experts: each gets all tokens, multiplied by its routing weights, which are mostly 0."""

    def _check(self, source: torch.nn.Module) -> None:
        require_known(self.layer.prefix, source, marked=False)

    def _gate(self, source: Any) -> Gate:
        act: Gate = source.act_fn

        def gate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, dim=-1)
            return second * act(first)

        return gate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the experts' outputs for ``hidden``; both are [experts · tokens, hidden], expert by expert."""
        tokens = hidden.shape[0] // self.layer.experts
        ids = torch.arange(self.layer.experts, device=hidden.device).repeat_interleave(tokens)
        # An expert without biases maps zeros to zeros: tokens with the routing weight 0 need no work.
        ids = torch.where((hidden != 0).any(dim=-1), ids, -1)[:, None]
        return super().forward(hidden, ids, torch.ones_like(ids, dtype=hidden.dtype))


class SwitchExperts(RoutedExperts):
    """Switch Transformer's experts wo(act(wi(x))): one per token, or none if the expert is full."""

    def _check(self, source: torch.nn.Module) -> None:
        experts = (name for name, _ in source.named_children())
        require_tensors(
            self.layer.prefix, source, {f"{name}.{part}.weight" for name in experts for part in ("wi", "wo")}
        )

    def _gate(self, source: Any) -> Gate:
        act: Gate = source["expert_0"].act
        return act

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return each token's weighted expert output [tokens, hidden].

        Args:
            hidden: hidden states [tokens, hidden].
            mask: [tokens, 1, experts], 1 for a token's expert and else 0.
            weights: routing weights [tokens, 1].
        """
        ids = torch.where(mask.any(dim=-1), mask.argmax(dim=-1), -1)
        return super().forward(hidden, ids, weights)


CALLED_OTHERWISE: dict[str, type[RoutedExperts]] = {
    "Llama4TextExperts": Llama4Experts,
    "SwitchTransformersExperts": SwitchExperts,
}
"""Our classes for transformers' classes of experts that are called in another way, by name."""


def packed_experts(layer: StoredLayer, source: Any) -> RoutedExperts:
    """Return the module that replaces transformers' experts.

    Raises:
        MoeqError: see :class:`RoutedExperts`.
    """
    return CALLED_OTHERWISE.get(type(source).__name__, RoutedExperts)(layer, source)
