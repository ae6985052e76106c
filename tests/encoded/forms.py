"""Encoded forms of a matrix, and the libraries that decode them: a row for each form that sources have.

GPTQ and AWQ are decoded by GPTQModel in a process of its own, since importing it changes transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

FLOAT8, EXPONENT = torch.float8_e4m3fn, torch.float8_e8m0fnu


@dataclass(frozen=True)
class Form:
    """One of them.

    Attributes:
        settings: the quantization_config.
        encode: makes of float32 weights [N, K], multiples of 128, the tensors after the module's name and a dot.
        decode: another program's float32 weights; None where it runs in its own process.
        exact: dtype in which that program multiplies, and rounds its result to.
        file: the file that has the settings instead of config.json.
    """

    settings: Mapping[str, Any]
    encode: Callable[[torch.Tensor], Tensors]
    decode: Callable[[Tensors], torch.Tensor] | None = None
    exact: torch.dtype = torch.float32
    file: str | None = None


def blocks(weight: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Return the largest magnitude of each block, [N / high, K / wide]."""
    return weight.abs().unflatten(0, (-1, high)).unflatten(2, (-1, wide)).amax(dim=(1, 3)).clamp(min=1e-6)


def spread(scales: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    return scales.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)


def power_of_two(scales: torch.Tensor) -> torch.Tensor:
    return scales.log2().ceil().exp2()


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the nearest four-bit floats as codes, two in a byte."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (values.abs()[..., None] - table).abs().argmin(dim=-1) | ((values < 0).long() << 3)
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


# DeepSeek's, MiniMax' and transformers' ------------------------------------------------------------------------------


def fp8_blocks(high: int, wide: int, name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], Tensors]:
    """Return an encoder to float8 with a scale per block, a power of two if its dtype has nothing else."""

    def encode(weight: torch.Tensor) -> Tensors:
        scales = blocks(weight, high, wide) / 448
        scales = power_of_two(scales) if dtype in (EXPONENT, torch.uint8) else scales
        values = (weight / spread(scales, high, wide)).to(FLOAT8)
        stored = scales.to(EXPONENT).view(torch.uint8) if dtype is torch.uint8 else scales.to(dtype)
        return {"weight": values, name: stored}

    return encode


def deepseek_v4_expert(weight: torch.Tensor) -> Tensors:
    """Encode to four-bit floats in int8, with a power of two per 32 weights."""
    scales = power_of_two(blocks(weight, 1, 32) / 6)
    codes = fp4_codes(weight / spread(scales, 1, 32))
    return {"weight": codes.view(torch.int8), "scale": scales.to(EXPONENT)}


def by_transformers(tensors: Tensors) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = next(tensor for name, tensor in tensors.items() if "scale" in name)
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
    scale = scale[:, 0, :, 0] if scale.ndim == 4 else scale
    found: torch.Tensor = Fp8Dequantize(None)._dequantize_one(tensors["weight"], scale, torch.float32)
    return found


def _fp8(high: int, wide: int, dtype: torch.dtype = torch.float32, name: str = "weight_scale_inv", **more: Any) -> Form:
    settings = {"quant_method": "fp8", "weight_block_size": [high, wide], **more}
    return Form(settings, fp8_blocks(high, wide, name, dtype), by_transformers)


# Modelopt's ----------------------------------------------------------------------------------------------------------


def fp8_tensor(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / 448
    return {"weight": (weight / scale).to(FLOAT8), "weight_scale": scale, "input_scale": torch.tensor(1.5)}


def fp8_blocks_apart(weight: torch.Tensor) -> Tensors:
    """Encode with a scale per 128 × 128 weights, in four dimensions."""
    stored = fp8_blocks(128, 128, "weight_scale", torch.float32)(weight)
    return {**stored, "weight_scale": stored["weight_scale"][:, None, :, None]}


def nvfp4(weight: torch.Tensor) -> Tensors:
    """Encode with a power of two for the whole tensor: then a factor here is an exact divisor elsewhere."""
    whole = power_of_two(weight.abs().amax() / (6 * 448))
    scales = (blocks(weight, 1, 16) / 6 / whole).to(FLOAT8)
    codes = fp4_codes(weight / (spread(scales, 1, 16) * whole))
    return {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(1.5)}


def nvfp4_by_compressed_tensors(tensors: Tensors) -> torch.Tensor:
    whole = (1 / tensors["weight_scale_2"]).reshape(1)
    same = {"weight_packed": tensors["weight"], "weight_scale": tensors["weight_scale"], "weight_global_scale": whole}
    return compressed_tensors("nvfp4-pack-quantized", NVFP4).decode_(same)


# compressed-tensors' -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compressed:
    """A format of compressed-tensors with one group of modules."""

    name: str
    weights: Mapping[str, Any]

    def _parts(self) -> tuple[Any, Any]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**self.weights))
        return BaseCompressor.get_value_from_registry(self.name), scheme

    def encode_(self, tensors: Tensors) -> Tensors:
        compressor, scheme = self._parts()
        found: Tensors = compressor.compress(tensors, scheme)
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def decode_(self, tensors: Tensors) -> torch.Tensor:
        compressor, scheme = self._parts()
        found: torch.Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
        return found.float()

    def settings(self) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": dict(self.weights), "input_activations": None}
        return {"quant_method": "compressed-tensors", "format": self.name, "config_groups": {"group_0": group}}


def compressed_tensors(name: str, weights: Mapping[str, Any]) -> Compressed:
    return Compressed(name, {key: value for key, value in weights.items() if not key.startswith("_")})


_FLOAT, _INT = {"type": "float", "symmetric": True}, {"type": "int", "symmetric": True}
NVFP4 = {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, **_FLOAT}
MXFP4 = {"num_bits": 4, "strategy": "group", "group_size": 32, **_FLOAT}
MXFP8 = {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, **_FLOAT}


def _sized(name: str, weights: Mapping[str, Any], high: int | None, wide: int | None, more: str = "") -> Form:
    """Return a form with a scale per block; None stands for all rows, or all columns.

    Args:
        name: the format.
        weights: what the config says of weights.
        high: rows of a block.
        wide: columns of a block.
        more: "power" for scales that are powers of two, "order" for groups in another order, "zero" for zero points,
            "whole" for a scale of all besides.
    """
    form = compressed_tensors(name, weights)
    largest = {"float": {8: 448.0, 4: 6.0}, "int": {8: 127.0, 4: 7.0, 2: 1.0}}[weights["type"]][weights["num_bits"]]

    def encode(weight: torch.Tensor) -> Tensors:
        index = torch.arange(weight.shape[1]).flip(0) // (wide or 1) if more == "order" else None
        order = slice(None) if index is None else torch.argsort(index)
        block = (high or weight.shape[0], wide or weight.shape[1])
        scales = blocks(weight[:, order], *block) / largest
        state = {"weight": weight, "weight_scale": power_of_two(scales) if more == "power" else scales}
        if high is None and wide is None:
            state["weight_scale"] = scales.reshape(1)
        if index is not None:
            state["weight_g_idx"] = index.int()
        if more == "zero":
            state["weight_zero_point"] = torch.arange(scales.numel()).reshape(scales.shape).remainder(5).sub(2).char()
        if more == "whole":
            state["weight_global_scale"] = (448 / scales.amax()).reshape(1)
            state["weight_scale"] = (scales * state["weight_global_scale"]).to(FLOAT8).float()
        return form.encode_(state)

    exact = torch.bfloat16 if more in ("whole", "power") else torch.float32
    return Form(form.settings(), encode, form.decode_, exact)


def _int(bits: int, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    size = {} if group is None else {"group_size": group}
    return {"num_bits": bits, "strategy": strategy, **_INT, **size, **more}


_E4M3 = {"num_bits": 8, **_FLOAT}


# GPTQ's and AWQ's ----------------------------------------------------------------------------------------------------


def pack_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., n] into words as one stream of bits, by Python's integers."""
    flat = codes.reshape(-1, codes.shape[-1]).tolist()
    count = codes.shape[-1] * bits // 32
    whole = [sum(code << (place * bits) for place, code in enumerate(row)) for row in flat]
    words = [[(number >> (32 * word)) & 0xFFFFFFFF for word in range(count)] for number in whole]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).reshape(*codes.shape[:-1], count)


def _grid(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [N, K], and scales and zero points [N, K / group]."""
    low, high = (weight.unflatten(1, (-1, group)).aminmax(dim=2)[place] for place in (0, 1))
    scales = ((high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)).clamp(min=1e-6)
    zeros = (-low.clamp(max=0) / scales).round().clamp(1, 2**bits - 1)
    codes = (weight / spread(scales, 1, group) + spread(zeros, 1, group)).round().clamp(0, 2**bits - 1)
    return codes.long(), scales, zeros.long()


def gptq(bits: int, group: int, offset: int, ordered: bool = False) -> Callable[[torch.Tensor], Tensors]:
    """Return an encoder to GPTQ's form; ``ordered`` has groups of columns that are not neighbours."""

    def encode(weight: torch.Tensor) -> Tensors:
        index = torch.arange(weight.shape[1]) // group
        if ordered:
            index = index.flip(0).roll(7)
        order = torch.argsort(index, stable=True)
        codes, scales, zeros = _grid(weight[:, order], bits, group)
        codes = codes[:, torch.argsort(order)]
        return {
            "qweight": pack_stream(codes, bits).T.contiguous(),
            "qzeros": pack_stream(zeros.T - offset, bits),
            "scales": scales.T.contiguous(),
            "g_idx": index.int(),
        }

    return encode


def awq(weight: torch.Tensor) -> Tensors:
    codes, scales, zeros = _grid(weight, 4, 32)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(rows: torch.Tensor) -> torch.Tensor:
        return pack_stream(rows.T.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.T.contiguous()}


def _gptq(bits: int, group: int, offset: int, ordered: bool = False) -> Form:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered, "sym": False}
    form = {} if offset else {"checkpoint_format": "gptq_v2"}
    return Form({**settings, **form}, gptq(bits, group, offset, ordered))


FORMS: dict[str, Form] = {
    "fp8-blocks": _fp8(128, 128),
    "fp8-small-blocks": _fp8(32, 64),
    "fp8-exponents": _fp8(128, 128, EXPONENT, "scale", scale_fmt="ue8m0"),
    "fp8-bytes": _fp8(1, 32, torch.uint8),
    "fp8-fp4-experts": Form({"quant_method": "fp8", "weight_block_size": [128, 128]}, deepseek_v4_expert,
                            by_transformers),
    "modelopt-fp8": Form({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor, by_transformers),
    "modelopt-fp8-blocks": Form({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, fp8_blocks_apart,
                                by_transformers),
    "modelopt-nvfp4": Form({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, nvfp4,
                           nvfp4_by_compressed_tensors, torch.bfloat16, "hf_quant_config.json"),
    "ct-fp8-tensor": _sized("float-quantized", {**_E4M3, "strategy": "tensor"}, None, None),
    "ct-fp8-rows": _sized("float-quantized", {**_E4M3, "strategy": "channel"}, 1, None),
    "ct-fp8-groups": _sized("float-quantized", {**_E4M3, "strategy": "group", "group_size": 64}, 1, 64),
    "ct-fp8-blocks": _sized("float-quantized", {**_E4M3, "strategy": "block", "block_structure": [64, 32]}, 64, 32),
    "ct-mxfp8": _sized("mxfp8-quantized", MXFP8, 1, 32, "power"),
    "ct-mxfp4": _sized("mxfp4-pack-quantized", MXFP4, 1, 32, "power"),
    "ct-nvfp4": _sized("nvfp4-pack-quantized", NVFP4, 1, 16, "whole"),
    "ct-int4-groups": _sized("pack-quantized", _int(4, "group", 32), 1, 32),
    "ct-int4-zeros": _sized("pack-quantized", _int(4, "group", 32, symmetric=False), 1, 32, "zero"),
    "ct-int4-order": _sized("pack-quantized", _int(4, "group", 32, actorder="group"), 1, 32, "order"),
    "ct-int4-rows": _sized("pack-quantized", _int(4, "channel"), 1, None),
    "ct-int8-packed": _sized("pack-quantized", _int(8, "channel"), 1, None),
    "ct-int8": _sized("int-quantized", _int(8, "channel"), 1, None),
    "ct-int8-zeros": _sized("int-quantized", _int(8, "channel", symmetric=False), 1, None, "zero"),
    "gptq-2": _gptq(2, 64, 1),
    "gptq-3": _gptq(3, 64, 1),
    "gptq-4": _gptq(4, 32, 1),
    "gptq-4-order": _gptq(4, 32, 1, ordered=True),
    "gptq-8-v2": _gptq(8, 128, 0),
    "auto-round": Form({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
                        "group_size": 32}, gptq(4, 32, 1)),
    "awq": Form({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
}  # fmt: skip
"""Name → form."""
