"""The experts of a candidate: quantized on demand, or read from a folder that a quantizer has written."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import ExpertWeights, load_expert
from planner.model.layout import MoeLayer
from planner.model.quantized import DequantizedModel
from planner.quantization.quantizers import quantizer_for
from vllm_moeq.format import ShardSet


class Weights(Protocol):
    """The experts of one candidate, and the linears that belong to them."""

    def key(self, layer: MoeLayer, expert: int, /) -> Hashable:
        """Return a key for an expert's matrices. Candidates with equal keys share the matrices."""

    def load(self, decoder: Decoder, layer: MoeLayer, expert: int) -> ExpertWeights:
        """Return an expert's dequantized matrices, in the decoder's dtype and on its device."""

    def linears(self) -> DequantizedModel | None:
        """Return the checkpoint of the candidate's other linears; None if they are rounded without calibration."""


@dataclass(frozen=True)
class RoundedWeights:
    """Experts that are quantized on demand, without calibration.

    Attributes:
        widths: experts prefix → bits per expert.
        quantizer: name of the quantizer for two bits and more.
        one_bit: name of the quantizer for one bit.
        group_size: weights per scale, or −1 for whole rows.
    """

    widths: Mapping[str, Sequence[int]]
    quantizer: str
    one_bit: str
    group_size: int

    def key(self, layer: MoeLayer, expert: int) -> Hashable:
        """See :class:`Weights`."""
        return self.quantizer, self.one_bit, self.group_size, self.widths[layer.prefix][expert]

    def load(self, decoder: Decoder, layer: MoeLayer, expert: int) -> ExpertWeights:
        """See :class:`Weights`."""
        bits = self.widths[layer.prefix][expert]
        quantizer = quantizer_for(bits, self.quantizer, self.one_bit)
        exact = load_expert(decoder.model, layer, expert, decoder.device, torch.float32)
        matrices = (quantizer(matrix, bits, self.group_size).dequantize() for matrix in exact.matrices())
        return ExpertWeights(*(matrix.to(decoder.dtype) for matrix in matrices))

    def linears(self) -> None:
        """See :class:`Weights`."""
        return


class CheckpointWeights:
    """Experts of a checkpoint that moeq wrote.

    Args:
        folder: the checkpoint.
        calibrated: whether its other linears were calibrated with its experts; otherwise they are those of all.
    """

    def __init__(self, folder: Path, calibrated: bool) -> None:
        self.folder, self.calibrated = folder, calibrated
        self.model = DequantizedModel(folder)

    def key(self, _layer: MoeLayer, _expert: int) -> Hashable:
        """See :class:`Weights`."""
        return self.folder

    def load(self, decoder: Decoder, layer: MoeLayer, expert: int) -> ExpertWeights:
        """See :class:`Weights`."""
        return load_expert(self.model, layer, expert, decoder.device, decoder.dtype)

    def linears(self) -> DequantizedModel | None:
        """See :class:`Weights`."""
        return self.model if self.calibrated else None


class DenseWeights:
    """Experts whose dequantized matrices are in a folder (:mod:`planner.comparison.slim`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = ShardSet(folder)

    def key(self, _layer: MoeLayer, _expert: int) -> Hashable:
        """See :class:`Weights`."""
        return self.folder

    def load(self, decoder: Decoder, layer: MoeLayer, expert: int) -> ExpertWeights:
        """See :class:`Weights`."""
        names = (layer.weight(expert, projection) for projection in layer.projections.names())
        return ExpertWeights(*(self.shards.load(name).to(decoder.device, decoder.dtype) for name in names))

    def linears(self) -> None:
        """See :class:`Weights`."""
        return


@dataclass(frozen=True)
class Candidate:
    """One model to evaluate.

    Attributes:
        name: unique name that is fit for file names.
        weights: the model's experts.
        odp: threshold of ODP; an expert is skipped if its routing weight is below this share of the token's largest.
            0 skips none.
    """

    name: str
    weights: Weights
    odp: float = 0.0
