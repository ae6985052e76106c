"""Pack quantized matrices into the tensors of a shard, and measure their errors."""

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
    """A matrix, or some of its rows, on the CPU and in the form of the file.

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
    """The errors of one quantized expert.

    Attributes:
        expert: the expert's index within the layer.
        bits: width of its codes.
        quantizer: name of the quantizer that chose the codes.
        relative_error: ‖W − Ŵ‖ / ‖W‖ over the expert's matrices.
        fallback: reason why ``quantizer`` is not the requested one; None if it is.
        tokens: number of calibration tokens that were routed to the expert.
        output_error: ‖Y − Ŷ‖ / ‖Y‖ of its outputs on these tokens, weighted by the router.
    """

    expert: int
    bits: int
    quantizer: str
    relative_error: float
    fallback: str | None = None
    tokens: int | None = None
    output_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are not None, for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def pack_matrix(weight: torch.Tensor, result: QuantizedMatrix) -> PackedMatrix:
    """Pack one matrix, or some of its rows, and measure the error.

    Args:
        weight: the exact values, float [N, K], on the device of ``result``.
        result: the quantized values.
    """
    exact = weight.float()
    return PackedMatrix(
        tensors=result.tensors(),
        squared_error=_squared(result.dequantize().sub_(exact)),
        squared_norm=_squared(exact),
    )


def _squared(values: torch.Tensor) -> float:
    """Return Σ v² of a matrix: float32 sums per row, then an exact sum, so that threads do not change the result."""
    return math.fsum(values.square().sum(dim=1).tolist())


def join_rows(parts: Sequence[PackedMatrix]) -> PackedMatrix:
    """Join consecutive rows into one matrix.

    Raises:
        ValueError: a tensor's dtype differs between the parts.
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
        layer: the expert's layer.
        expert: the expert's index.
        bits: width of the codes.
        matrices: projection → packed matrix, for every projection.
        quantizer: name of the quantizer that chose the codes.
        fallback: reason why ``quantizer`` is not the requested one; None if it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    for projection, matrix in matrices.items():
        base = f"{layer.prefix}.{expert}.{projection}"
        tensors.update({f"{base}.{suffix}": tensor for suffix, tensor in matrix.tensors.items()})
    error = math.fsum(matrix.squared_error for matrix in matrices.values())
    norm = math.fsum(matrix.squared_norm for matrix in matrices.values())
    relative = math.sqrt(error / norm) if norm else 0.0
    return tensors, ExpertReport(expert, bits, quantizer, round(relative, 6), fallback)
