"""Quantize matrices in a rotated basis (:mod:`vllm_moeq.format.rotation`): rotate, quantize, and remember the rotation.

Any quantizer can follow. Rounding then meets weights that are nearly normal, and no input stands out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from planner.model.layout import MoeLayer
from planner.quantization.quantizers.base import QuantizedMatrix, Quantizer
from planner.quantization.quantizers.target import Aim
from vllm_moeq.format import SIGNS, Rotation, pack_signs, rotate, rotation_size, unrotate

AT_A_TIME = 256
"""Rows of moments that are rotated together."""


@dataclass(frozen=True)
class Basis:
    """The rotation of a projection's inputs.

    Attributes:
        signs: 1 or −1, float32 [K].
        size: inputs per block.
    """

    signs: torch.Tensor
    size: int

    def weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Return weights [..., N, K] for rotated inputs, float32."""
        return rotate(weights, self.signs.to(weights.device), self.size)

    def moments(self, moments: torch.Tensor) -> torch.Tensor:
        """Return the moments [..., K, K] of rotated inputs, Q·M·Qᵀ, float32 in the place of M: they may fill memory."""
        signs = self.signs.to(moments.device)
        for turned in (moments, moments.mT):
            for part in turned.split(AT_A_TIME, dim=-2):
                part.copy_(rotate(part, signs, self.size))
        return moments

    def aim(self, aim: Aim) -> Aim:
        """Return the aim of matrices with rotated inputs; its shift is overwritten, as by :meth:`moments`."""
        return Aim(self.moments(aim.shift), None if aim.lost is None else self.weights(aim.lost))

    def wrap(self, matrix: QuantizedMatrix) -> Rotated:
        """Return a matrix that was quantized for rotated inputs."""
        return Rotated(matrix, self)


@dataclass(frozen=True)
class Rotated:
    """A matrix that was quantized for rotated inputs.

    Attributes:
        matrix: the matrix as it is stored.
        basis: the rotation of its inputs.
    """

    matrix: QuantizedMatrix
    basis: Basis

    def dequantize(self) -> torch.Tensor:
        """Return the weights for inputs that are not rotated, float32 [N, K]."""
        stored = self.matrix.dequantize()
        return unrotate(stored, self.basis.signs.to(stored.device), self.basis.size)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See :meth:`planner.quantization.quantizers.base.QuantizedMatrix.tensors`."""
        return self.matrix.tensors()

    def rows(self, part: slice) -> Rotated:
        """See :meth:`planner.quantization.quantizers.base.QuantizedMatrix.rows`."""
        return Rotated(self.matrix.rows(part), self.basis)


def rounded_in(
    basis: Basis | None, quantizer: Quantizer, weights: torch.Tensor, bits: int, group_size: int
) -> QuantizedMatrix:
    """Quantize a matrix by its weights alone, in a rotated basis or as it is.

    Args:
        basis: the rotation of its inputs, if any.
        quantizer: the function that quantizes.
        weights: float [N, K].
        bits: width of the codes.
        group_size: weights per scale, or −1 for whole rows.
    """
    if basis is None:
        return quantizer(weights, bits, group_size)
    return basis.wrap(quantizer(basis.weights(weights), bits, group_size))


def rotation_of(layer: MoeLayer) -> Rotation:
    """Return the sizes of a layer's rotation: the largest that kernels take and its inputs allow."""
    inputs = (layer.shapes[name][1] for name in (layer.projections.gate, layer.projections.down))
    return Rotation.model_validate(dict(zip(("input", "inner"), map(rotation_size, inputs), strict=True)))


def bases(layer: MoeLayer, rotation: Rotation | None) -> dict[str, Basis]:
    """Return the basis of each projection of a layer; none without a rotation.

    Signs are random, but the same for the same layer, so that a resumed run and a worker find them again.
    """
    if rotation is None:
        return {}
    up, down = layer.projections.gate, layer.projections.down
    first = Basis(_signs(f"{layer.prefix}.{up}", layer.shapes[up][1]), rotation.input)
    second = Basis(_signs(f"{layer.prefix}.{down}", layer.shapes[down][1]), rotation.inner)
    return {name: second if name == down else first for name in layer.projections.names()}


def sign_tensors(layer: MoeLayer, found: Mapping[str, Basis]) -> dict[str, torch.Tensor]:
    """Return a layer's signs under their names in a checkpoint, from what :func:`bases` returns."""
    beside = (layer.projections.gate, layer.projections.down)
    return {f"{layer.prefix}.0.{name}.{SIGNS}": pack_signs(found[name].signs) for name in beside if name in found}


def _signs(name: str, count: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed)).float().mul_(2).sub_(1)
