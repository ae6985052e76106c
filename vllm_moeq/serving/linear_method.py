"""Packed linears outside the experts for which vLLM has no CPU kernel: run by ours, or unpacked while they load."""

from __future__ import annotations

from typing import Any

import torch

from vllm_moeq.format import LINEAR_SUFFIXES, Linear, UsageError, linear_values
from vllm_moeq.kernels import LinearKernel, MakeLinear, choose_linear, requested_backend
from vllm_moeq.serving.seam import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    QuantizeMethodBase,
    UnquantizedLinearMethod,
    current_platform,
    logger,
)

WORDS, SCALES, SHAPE = LINEAR_SUFFIXES


def unserved(linear: Linear, dtype: torch.dtype) -> str | None:
    """Return why vLLM has no kernel for linears of this format on this platform, or None if it has.

    Args:
        linear: the format.
        dtype: the dtype of the activations.
    """
    if not current_platform.is_cpu():
        return None
    if dtype == torch.float32:
        return "vLLM's CPU kernels for few bits take half precision, not float32"
    if linear.bits != 4:
        return f"vLLM's CPU kernels serve 4 bits, not {linear.bits}"
    return None if hasattr(torch.ops._C, "cpu_gemm_wna16") else "vLLM's CPU kernel for 4 bits needs AVX-512"


def choose_method(linear: Linear, prefix: str, reason: str) -> NativeLinearMethod | UnpackedLinearMethod:
    """Return the method of a linear that vLLM's kernels do not support: packed if our kernel runs, else unpacked."""
    row, missing = choose_linear(requested_backend())
    if row is not None and row.linear is not None:
        logger.info_once("moeq: other linears run in the %s kernel, packed: %s", row.name, reason)
        return NativeLinearMethod(linear, prefix, row.linear)
    logger.info_once("moeq: other linears take 16 bits in memory: %s; %s", reason, missing)
    return UnpackedLinearMethod(linear, prefix)


class PackedLinearMethod(QuantizeMethodBase):
    """The loading of compressed-tensors' symmetric ``pack-quantized`` form.

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
        """Allocate this rank's words [outputs, inputs·bits/32] and scales [outputs, inputs/group].

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
        layer.register_parameter(WORDS, packed)
        layer.register_parameter(
            SCALES, GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=loader)
        )
        layer.register_parameter(SHAPE, BasevLLMParameter(data=torch.empty(2, dtype=torch.int64), weight_loader=loader))

    def take_loaded(self, layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Return words and scales, and take them off the layer."""
        words, scales = getattr(layer, WORDS).data, getattr(layer, SCALES).data
        for name in (WORDS, SCALES, SHAPE):
            delattr(layer, name)
        return words, scales


class NativeLinearMethod(PackedLinearMethod):
    """A linear that stays packed and runs in our kernel.

    Args:
        linear: the checkpoint's format.
        prefix: the layer's name.
        make: repacks the linear for the kernel.
    """

    def __init__(self, linear: Linear, prefix: str, make: MakeLinear) -> None:
        super().__init__(linear, prefix)
        self._make = make
        self.kernel: LinearKernel | None = None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Repack the words and scales for the kernel, into one parameter under the name of the words."""
        self.kernel = self._make(*self.take_loaded(layer), self.linear.bits)
        layer.register_parameter(WORDS, torch.nn.Parameter(self.kernel.weight, requires_grad=False))

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x · Wᵀ + bias [..., rows on this rank] in x's dtype."""
        assert self.kernel is not None
        result = self.kernel(x)
        return result if bias is None else result + bias


class UnpackedLinearMethod(PackedLinearMethod, UnquantizedLinearMethod):
    """A linear that is unpacked while the model loads, and multiplies in the activations' dtype."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replace the packed words by the dequantized weights, rounded once."""
        words, scales = self.take_loaded(layer)
        values = linear_values(words, scales, self.linear.bits).to(scales.dtype)
        layer.register_parameter("weight", torch.nn.Parameter(values, requires_grad=False))
        super().process_weights_after_loading(layer)
