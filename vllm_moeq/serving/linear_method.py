"""Packed linears that are no experts, where vLLM has no kernel for their width: unpacked while the model loads."""

from __future__ import annotations

from typing import Any

import torch

from vllm_moeq.format import PACKED, SCALE, Linear, UsageError, linear_values
from vllm_moeq.serving.seam import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    UnquantizedLinearMethod,
    current_platform,
)

SHAPE = "weight_shape"


def unpacked(linear: Linear, dtype: torch.dtype) -> str | None:
    """Return why linears of this format have to be unpacked on this platform, or None where vLLM serves them.

    Args:
        linear: the format.
        dtype: of the activations.
    """
    if not current_platform.is_cpu():
        return None
    if dtype == torch.float32:
        return "vLLM's CPU kernels for few bits take half precision, not float32"
    if linear.bits != 4:
        return f"vLLM's CPU kernels serve 4 bits, not {linear.bits}"
    return None if hasattr(torch.ops._C, "cpu_gemm_wna16") else "vLLM's CPU kernel for 4 bits needs AVX-512"


class UnpackedLinearMethod(UnquantizedLinearMethod):
    """Loads compressed-tensors' symmetric ``pack-quantized`` form and multiplies in the activations' dtype.

    Args:
        linear: the checkpoint's format.
        prefix: the layer's name.
    """

    def __init__(self, linear: Linear, prefix: str) -> None:
        super().__init__()
        self.linear = linear
        self.prefix = prefix

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Allocate packed words and scales [outputs, inputs / …] for this rank.

        Raises:
            UsageError: tensor parallelism splits the input dimension inside a group.
        """
        bits, group = self.linear.bits, self.linear.group_size
        if input_size_per_partition % group:
            raise UsageError(
                f"{self.prefix}: expected an input size per rank that is a multiple of the group size {group}, "
                f"found {input_size_per_partition}; lower --tensor-parallel-size or quantize again with "
                "--linear-group-size"
            )
        rows, loader = sum(output_partition_sizes), extra["weight_loader"]
        words = torch.empty(rows, input_size_per_partition * bits // 32, dtype=torch.int32)
        scales = torch.empty(rows, input_size_per_partition // group, dtype=params_dtype)
        packed = PackedvLLMParameter(
            data=words, input_dim=1, output_dim=0, packed_dim=1, packed_factor=32 // bits, weight_loader=loader
        )
        layer.register_parameter(PACKED, packed)
        layer.register_parameter(
            SCALE, GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=loader)
        )
        layer.register_parameter(SHAPE, BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=loader))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed words by the values that they stand for, rounded once."""
        scales = getattr(layer, SCALE).data
        values = linear_values(getattr(layer, PACKED).data, scales, self.linear.bits).to(scales.dtype)
        for name in (PACKED, SCALE, SHAPE):
            delattr(layer, name)
        layer.register_parameter("weight", torch.nn.Parameter(values, requires_grad=False))
        super().process_weights_after_loading(layer)
