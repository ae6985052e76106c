"""The quantization method of one MoE layer in vLLM."""

from __future__ import annotations

from typing import Any

import torch

from vllm_moeq.format import CODES_PER_BLOCK, SIGNS, BlockRotation, MoeqConfig, Scheme, UsageError, drop_weak
from vllm_moeq.kernels import (
    SILU,
    LayerKernel,
    PackedExperts,
    PackedMatrices,
    RaggedMatrices,
    choose,
    make_layer,
    of_one_dtype,
    requested_backend,
)
from vllm_moeq.serving.activations import activation_of, check_back_end, is_of_back_end
from vllm_moeq.serving.arguments import check_arguments
from vllm_moeq.serving.checkpoint import Checkpoint
from vllm_moeq.serving.loading import ExpertLoader, Partition
from vllm_moeq.serving.routing import complete_router, load_bias
from vllm_moeq.serving.seam import (
    FusedMoEConfig,
    FusedMoEMethodBase,
    RoutedExperts,
    get_current_vllm_config,
    logger,
)

PARTS = ("w13", "w2")
"""vLLM's names of gate and up (stacked) and of down."""


class MoeqMoEMethod(FusedMoEMethodBase):
    """A layer of packed experts with different widths.

    Args:
        moe_config: vLLM's description of the layer and its parallelism.
        config: the checkpoint's configuration.
        prefix: the layer's name in the checkpoint.
        widths: the width of each global expert.
        schemes: the scheme of each global expert.
        threshold: a share of a token's largest routing weight; experts with less are skipped. 0 skips none.
        checkpoint: the checkpoint that the weights are loaded from.
    """

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        config: MoeqConfig,
        prefix: str,
        widths: list[int],
        schemes: list[Scheme],
        threshold: float = 0.0,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        super().__init__(moe_config)
        self.config = config
        self.prefix = prefix
        self.widths = widths
        self.schemes = schemes
        self.threshold = threshold
        self._checkpoint = checkpoint
        self._loader: ExpertLoader | None = None
        self._kernel: LayerKernel | None = None
        self._activation = SILU

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Allocate a buffer of the exact size for each part and suffix, for this rank's share.

        Raises:
            UsageError: an option of the layer or of the parallel layout is not supported.
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
            ranks=layer.moe_config.intermediate_size // intermediate_size_per_partition,
            schemes=tuple(self.schemes),
        )
        self.partition = partition
        self._dtype = params_dtype
        self._loader = ExpertLoader(partition, self._checkpoint)
        # All suffixes of the layer, because vLLM also looks up the parameters of other ranks' experts.
        suffixes = dict.fromkeys(suffix for scheme in self.schemes for suffix in scheme.suffixes)
        for part in PARTS:
            matrices = self._matrices(part)
            for suffix in suffixes:
                data = matrices.empty(suffix) if suffix in matrices.suffixes else torch.empty(0)
                parameter = torch.nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = self._loader.loader_for(suffix)  # type: ignore[attr-defined]
                layer.register_parameter(f"{part}_{suffix}", parameter)
            if partition.rotated(part) is not None:
                words = torch.empty(matrices.columns // CODES_PER_BLOCK, dtype=torch.int32)
                signs = torch.nn.Parameter(words, requires_grad=False)
                signs.weight_loader = self._loader.sign_loader(part)  # type: ignore[attr-defined]
                layer.register_parameter(f"{part}_{SIGNS}", signs)

    def _matrices(self, part: str) -> RaggedMatrices:
        """Return the layout of one of :data:`PARTS`."""
        return self.partition.w13 if part == PARTS[0] else self.partition.w2

    def _parameters(self, layer: RoutedExperts, part: str) -> dict[str, torch.nn.Parameter]:
        """Return the loaded tensors of one of :data:`PARTS` by suffix."""
        return {suffix: getattr(layer, f"{part}_{suffix}") for suffix in self._matrices(part).suffixes}

    def _check(self, layer: RoutedExperts) -> None:
        check_arguments(layer, self.prefix)
        self._activation = activation_of(layer.moe_config, self.prefix)
        if is_of_back_end(layer):
            check_back_end(self._activation, get_current_vllm_config().model_config.hf_text_config, self.prefix)
        stored = self.config.projections.up is not None
        if stored != self._activation.gated:
            raise UsageError(
                f"{self.prefix}: activation: expected experts {'with' if stored else 'without'} a gate, as in the "
                f"checkpoint, found {self._activation}"
            )
        if len(self.widths) != layer.global_num_experts:
            raise UsageError(
                f"{self.prefix}: expected {layer.global_num_experts} widths in quantization_config.experts, "
                f"found {len(self.widths)}"
            )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Require that every tensor of every local expert was loaded, and choose a kernel."""
        load_format = get_current_vllm_config().load_config.load_format
        if self._loader is not None and load_format != "dummy":
            self._loader.check_complete()
            load_bias(layer, self.prefix, self._checkpoint)
        complete_router(layer)
        # Loading may have widened scales or zeros to float32; the kernels need one dtype for both.
        for part in PARTS:
            parameters = self._parameters(layer, part)
            for suffix, data in of_one_dtype({suffix: it.data for suffix, it in parameters.items()}).items():
                parameters[suffix].data = data
        self._choose_kernel(layer)

    def _choose_kernel(self, layer: RoutedExperts) -> None:
        """Repack for a kernel, compile its variants, and free the loaded buffers unless it needs them."""
        packed = PackedExperts(self._packed(layer, PARTS[0]), self._packed(layer, PARTS[1]), self._activation)
        choice = choose(packed, requested_backend())
        logger.info_once("moeq: %s kernel: %s", choice.backend, choice.reason)
        row, on_gpu = choice.row, packed.device.type == "cuda"
        if on_gpu and not row.captured and not get_current_vllm_config().model_config.enforce_eager:
            raise UsageError(
                f"the {row.name} kernel ({choice.reason}) waits for the GPU in every call: expected --enforce-eager"
            )
        self._kernel = make_layer(packed, self._dtype, row.name)
        if self._loader is not None:
            self._loader.close()
        self._kernel.warm_up(self._dtype, layer.moe_config.experts_per_token)
        if row.keeps_loaded:
            return
        for part in PARTS:
            for parameter in self._parameters(layer, part).values():
                parameter.data = parameter.data.new_empty(0)

    def _packed(self, layer: RoutedExperts, part: str) -> PackedMatrices:
        tensors = (parameter.data for parameter in self._parameters(layer, part).values())
        rotated = self.partition.rotated(part)
        rotation = None if rotated is None else BlockRotation(getattr(layer, f"{part}_{SIGNS}").data, rotated.size)
        return PackedMatrices(self._matrices(part), *tensors, rotation=rotation)

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
        """Return this rank's sum over the routed experts, [tokens, hidden]; vLLM adds up the ranks' sums."""
        if layer.apply_router_weight_on_input:  # Llama-4
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if self.threshold > 0:
            # Drop before mapping: a token's largest weight may belong to another rank's expert.
            topk_ids, topk_weights = drop_weak(topk_ids, topk_weights, self.threshold)
        if layer.expert_map is not None:
            local = layer.expert_map[topk_ids.clamp(min=0)]
            topk_ids = torch.where(topk_ids < 0, topk_ids, local)
        assert self._kernel is not None
        return self._kernel(x, topk_weights, topk_ids)
