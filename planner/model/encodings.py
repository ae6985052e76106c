"""Formats of source weights with fewer than sixteen bits. They are decoded to bfloat16 while they are read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch

from vllm_moeq.format import CheckpointError
from vllm_moeq.format.tensors import Tensors

Parts = Mapping[str, torch.Tensor]
"""Suffix → the tensor that the file holds under this suffix for one matrix."""


@dataclass(frozen=True)
class Codec:
    """A storage format of one tensor. This base class stores the values unchanged.

    Attributes:
        suffixes: suffixes appended to the tensor's name; the first one is for the values.
        bits: stored bits per weight, scales included.
        dtype: dtype of the decoded values; None for the file's dtype.
    """

    suffixes: tuple[str, ...] = ("",)
    bits: float = 16
    dtype: torch.dtype | None = None

    def tensors(self, name: str) -> dict[str, str]:
        """Return suffix → name of the stored tensors that together encode ``name``."""
        return {suffix: name + suffix for suffix in self.suffixes}

    def shape(self, name: str, files: Tensors) -> tuple[int, ...]:
        """Return the shape of the decoded tensor.

        Raises:
            CheckpointError: scales that do not fit the values.
        """
        return files.info(name + self.suffixes[0]).shape

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """Return the stored rows ``first``, ``first + step``, … below ``last``, decoded."""
        return parts[""][first:last:step]


BLOCK = 128
"""Number of rows and of columns that share a scale in DeepSeek's eight-bit checkpoints."""


class Fp8Blocks(Codec):
    """float8_e4m3fn values and a float32 scale per 128 × 128 weights (DeepSeek-V3, MiniMax-M2): w = value · scale."""

    def __init__(self) -> None:
        super().__init__(("", "_scale_inv"), 8 + 32 / BLOCK**2, torch.bfloat16)

    def shape(self, name: str, files: Tensors) -> tuple[int, ...]:
        """See :meth:`Codec.shape`."""
        values, scales = (files.info(tensor) for tensor in self.tensors(name).values())
        expected = tuple(-(-size // BLOCK) for size in values.shape)
        if values.dtype != torch.float8_e4m3fn or scales.shape != expected or not scales.dtype.is_floating_point:
            raise CheckpointError(
                f"{files.folder / scales.shard}: tensor {name}: expected float8_e4m3fn and scales {list(expected)} of "
                f"128 × 128 weights, found {values.dtype} {list(values.shape)} and {scales.dtype} {list(scales.shape)}"
            )
        return values.shape

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`."""
        values, scales = parts[""], parts["_scale_inv"]
        rows = torch.arange(first, last, step)
        wide = scales[rows // BLOCK].float().repeat_interleave(BLOCK, dim=1)[:, : values.shape[1]]
        return (values[first:last:step].float() * wide).bfloat16()


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the eight e2m1 codes without the sign bit."""

GROUP = 32
"""Number of weights that share an exponent in MXFP4."""


class Mxfp4(Codec):
    """A power-of-two scale and 16 bytes per 32 weights; a byte is two e2m1 codes, low half first (OCP MX, gpt-oss)."""

    def __init__(self) -> None:
        super().__init__(("_blocks", "_scales"), 4 + 8 / GROUP, torch.bfloat16)

    def shape(self, name: str, files: Tensors) -> tuple[int, ...]:
        """See :meth:`Codec.shape`."""
        blocks, scales = (files.info(tensor) for tensor in self.tensors(name).values())
        fits = blocks.shape[:-1] == scales.shape and blocks.shape[-1:] == (GROUP // 2,)
        if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or not fits:
            raise CheckpointError(
                f"{files.folder / blocks.shard}: tensor {name}_blocks: expected uint8 [..., groups, 16] and scales "
                f"[..., groups], found {blocks.dtype} {list(blocks.shape)} and {scales.dtype} {list(scales.shape)}"
            )
        return (*scales.shape[:-1], scales.shape[-1] * GROUP)

    def read(self, parts: Parts, first: int, last: int, step: int) -> torch.Tensor:
        """See :meth:`Codec.read`."""
        blocks, exponents = (part[first:last:step] for part in (parts["_blocks"], parts["_scales"]))
        table = torch.tensor([*FP4, *(-value for value in FP4)])
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
        values = torch.ldexp(table[codes.int()], exponents.int()[..., None] - 127)
        return values.flatten(-2).bfloat16()


PLAIN = Codec()

DECODED: dict[str, Codec] = {"fp8": Fp8Blocks(), "mxfp4": Mxfp4()}
"""``quant_method`` → codec, for sources that are already quantized in a readable format. A new one is a row here; no
other has one of its suffixes, and its values keep the name of the weight where they are a matrix."""


def codec_of(name: str, tensors: Container[str]) -> Codec:
    """Return the codec of a tensor. The names of the tensors that encode it reveal the codec.

    Args:
        name: name of the decoded tensor.
        tensors: names of all stored tensors.
    """
    for codec in DECODED.values():
        if any(f"{name}{suffix}" in tensors for suffix in codec.suffixes if suffix):
            return codec
    return PLAIN
