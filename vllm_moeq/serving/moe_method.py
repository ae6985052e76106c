"""The quantization method of one MoE layer in vLLM."""

from __future__ import annotations

import os
from typing import Any

import torch

from vllm_moeq.format import MoeqConfig, UsageError, drop_weak
from vllm_moeq.kernels import (
    VARIABLE,
    LayerKernel,
    PackedExperts,
    PackedMatrices,
    RaggedMatrices,
    choose,
    make_layer,
    moe,
)
from vllm_moeq.serving.checkpoint import Checkpoint
from vllm_moeq.serving.loading import ExpertLoader, Partition
from vllm_moeq.serving.seam import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
    get_current_vllm_config,
    logger,
)

WORDS, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero"


class MoeqMoEMethod(FusedMoEMethodBase):
    """Packed experts of different widths.

    Args:
        moe_config: vLLM's description of the layer and its parallelism.
        config: the checkpoint's configuration.
        prefix: the layer's name in the checkpoint.
        widths: one width per global expert.
        threshold: experts with less than this share of a token's largest routing weight are skipped;
            0 skips none.
        checkpoint: where the weights come from.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        config: MoeqConfig,
        prefix: str,
        widths: list[int],
        threshold: float = 0.0,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        super().__init__(moe_config)
        self.config = config
        self.prefix = prefix
        self.widths = widths
        self.threshold = threshold
        self._checkpoint = checkpoint
        self._loader: ExpertLoader | None = None
        self._kernel: LayerKernel | None = None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Allocate one exact buffer of packed words per projection pair, with this rank's scales and zeros.

        Raises:
            UsageError: an option of the layer or the parallel layout that the kernels do not have.
        """
        self._check(layer)
        experts = [g for g in range(len(self.widths)) if layer.expert_map_manager.map_global_to_local(g) >= 0]
        partition = Partition(
            prefix=self.prefix,
            config=self.config,
            widths=tuple(self.widths),
            local_experts=tuple(experts),
            hidden=hidden_size,
            intermediate=intermediate_size_per_partition,
            rank=layer.moe_config.moe_parallel_config.tp_rank,
        )
        self.partition = partition
        self._dtype = params_dtype
        self._loader = ExpertLoader(partition, self._checkpoint)
        for name, matrices in (("w13", partition.w13), ("w2", partition.w2)):
            shape = (len(experts), matrices.rows, matrices.groups)
            tensors = {
                WORDS: torch.empty(matrices.num_words, dtype=torch.int32),
                SCALE: torch.empty(shape, dtype=torch.float16),
                ZERO: torch.empty(shape, dtype=torch.float16),
            }
            for suffix, tensor in tensors.items():
                parameter = torch.nn.Parameter(tensor, requires_grad=False)
                parameter.weight_loader = self._loader.loader_for(suffix)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_{suffix}", parameter)

    def _check(self, layer: RoutedExperts) -> None:
        activation = getattr(layer.activation, "value", layer.activation)
        if activation != "silu":
            raise UsageError(f"{self.prefix}: expected the activation silu, found {activation}")
        if self.config.projections.up is None:
            raise UsageError(f"{self.prefix}: expected experts with gate, up and down, found no up")
        if len(self.widths) != layer.global_num_experts:
            raise UsageError(
                f"{self.prefix}: expected {layer.global_num_experts} widths in quantization_config.experts, "
                f"found {len(self.widths)}"
            )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Require that every tensor of every local expert was loaded."""
        load_format = get_current_vllm_config().load_config.load_format
        if self._loader is not None and load_format != "dummy":
            self._loader.check_complete()
        # Some widths' scales may have been widened to float32 while loading: make both tensors alike.
        for name in ("w13", "w2"):
            scale, zero = getattr(layer, f"{name}_{SCALE}"), getattr(layer, f"{name}_{ZERO}")
            dtype = torch.promote_types(scale.dtype, zero.dtype)
            scale.data, zero.data = scale.data.to(dtype), zero.data.to(dtype)
        self._choose_kernel(layer)

    def _choose_kernel(self, layer: RoutedExperts) -> None:
        """Repack for a kernel, compile its variants, and give the loaded buffers back."""
        packed = PackedExperts(*(self._packed(layer, name) for name in ("w13", "w2")))
        requested = os.environ.get(VARIABLE, "auto")
        choice = choose(packed, requested)
        logger.info_once("moeq: %s kernel: %s", choice.backend, choice.reason)
        if choice.backend == "reference":
            if packed.gate_up.words.is_cuda and not get_current_vllm_config().model_config.enforce_eager:
                raise UsageError(
                    f"the reference kernel ({choice.reason}) waits for the GPU in every call: expected --enforce-eager"
                )
            return
        self._kernel = make_layer(packed, self._dtype, choice.backend)
        self._kernel.warm_up(self._dtype, layer.moe_config.experts_per_token)
        for name in ("w13", "w2"):
            for suffix in (WORDS, SCALE, ZERO):
                parameter = getattr(layer, f"{name}_{suffix}")
                parameter.data = parameter.data.new_empty(0)

    def _packed(self, layer: RoutedExperts, name: str) -> PackedMatrices:
        matrices: RaggedMatrices = getattr(self.partition, name)
        words, scale, zero = (getattr(layer, f"{name}_{suffix}").data for suffix in (WORDS, SCALE, ZERO))
        return PackedMatrices(matrices, words, scale, zero)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Return None: vLLM's own kernels are not used."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return this rank's sum over the routed experts [tokens, hidden]; vLLM reduces it over ranks."""
        if layer.apply_router_weight_on_input:  # Llama-4
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if self.threshold > 0:
            # Before the map: a token's largest weight may be that of another rank's expert.
            topk_ids, topk_weights = drop_weak(topk_ids, topk_weights, self.threshold)
        if layer.expert_map is not None:
            local = layer.expert_map[topk_ids.clamp(min=0)]
            topk_ids = torch.where(topk_ids < 0, topk_ids, local)
        if self._kernel is not None:
            return self._kernel(x, topk_weights, topk_ids)
        return moe(
            x,
            topk_weights,
            topk_ids,
            (layer.w13_weight_packed, layer.w13_weight_scale, layer.w13_weight_zero),
            (layer.w2_weight_packed, layer.w2_weight_scale, layer.w2_weight_zero),
            list(self.partition.local_widths),
            self.config.group_size,
            self.partition.w2.group_offset,
        )
