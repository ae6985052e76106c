"""From quantized matrices to the tensors of a shard, and how well they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from planner.model.layout import MoeLayer
from planner.quantization.quantizers import QuantizedMatrix


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix, or some of its rows, as the file holds it, on the CPU.

    Attributes:
        tensors: the scheme's suffix → tensor; rows are the first dimension.
        squared_error: ‖W − Ŵ‖².
        squared_norm: ‖W‖².
    """

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of its tensors."""
        return tuple(tensor.dtype for tensor in self.tensors.values())


@dataclass(frozen=True)
class ExpertReport:
    """How well one expert survived.

    Attributes:
        expert: index within the layer.
        bits: width of its codes.
        quantizer: what found the codes.
        relative_error: ‖W − Ŵ‖ / ‖W‖ over the three matrices.
        fallback: why ``quantizer`` is not the one that was asked for.
        tokens: calibration tokens that were routed to it.
        output_error: ‖Y − Ŷ‖ / ‖Y‖ of its outputs on them, weighted by the router.
    """

    expert: int
    bits: int
    quantizer: str
    relative_error: float
    fallback: str | None = None
    tokens: int | None = None
    output_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON that say something."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def pack_matrix(weight: torch.Tensor, result: QuantizedMatrix) -> PackedMatrix:
    """Pack one matrix, or rows of it, and measure its error.

    Args:
        weight: the exact values, float [N, K], on the device of ``result``.
        result: its quantization.
    """
    exact = weight.float()
    return PackedMatrix(
        tensors=result.tensors(),
        squared_error=_squared(result.dequantize().sub_(exact)),
        squared_norm=_squared(exact),
    )


def _squared(values: torch.Tensor) -> float:
    """Return Σ v² of a matrix: by rows in float32, then exactly, so that threads do not change it."""
    return math.fsum(values.square().sum(dim=1).tolist())


def join_rows(parts: Sequence[PackedMatrix]) -> PackedMatrix:
    """Put consecutive rows together.

    Raises:
        ValueError: parts whose tensors differ in dtype.
    """
    if len({part.dtypes for part in parts}) > 1:
        raise ValueError("expected parts whose tensors have the same dtypes")
    return PackedMatrix(
        tensors={suffix: torch.cat([part.tensors[suffix] for part in parts]) for suffix in parts[0].tensors},
        squared_error=math.fsum(part.squared_error for part in parts),
        squared_norm=math.fsum(part.squared_norm for part in parts),
    )


def pack_expert(
    layer: MoeLayer,
    expert: int,
    bits: int,
    matrices: Mapping[str, PackedMatrix],
    quantizer: str,
    fallback: str | None = None,
) -> tuple[dict[str, torch.Tensor], ExpertReport]:
    """Return one expert's tensors under their checkpoint names, and its report.

    Args:
        layer: where the expert lives.
        expert: its index.
        bits: its width.
        matrices: projection → packed matrix, for every projection.
        quantizer: name of what found the codes.
        fallback: why it is not the quantizer that was asked for.
    """
    tensors: dict[str, torch.Tensor] = {}
    for projection, matrix in matrices.items():
        base = f"{layer.prefix}.{expert}.{projection}"
        tensors.update({f"{base}.{suffix}": tensor for suffix, tensor in matrix.tensors.items()})
    error = math.fsum(matrix.squared_error for matrix in matrices.values())
    norm = math.fsum(matrix.squared_norm for matrix in matrices.values())
    relative = math.sqrt(error / norm) if norm else 0.0
    return tensors, ExpertReport(expert, bits, quantizer, round(relative, 6), fallback)
