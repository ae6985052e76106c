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
from planner.quantization.quantizers.rotated import bases, rounded_in
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import Scheme, ShardSet


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
        settings: how they are quantized, with what their plan says.
    """

    widths: Mapping[str, Sequence[int]]
    settings: QuantizeSettings

    def key(self, layer: MoeLayer, expert: int) -> Hashable:
        """See :class:`Weights`."""
        chosen = self.settings
        kind = self._scheme(layer, expert), chosen.storage.rotated, self.widths[layer.prefix][expert]
        return chosen.quantizer, chosen.one_bit, chosen.group_size, kind

    def _scheme(self, layer: MoeLayer, expert: int) -> Scheme:
        return self.settings.storage.schemes(layer.prefix, self.widths[layer.prefix])[expert]

    def load(self, decoder: Decoder, layer: MoeLayer, expert: int) -> ExpertWeights:
        """See :class:`Weights`."""
        bits, chosen, found = self.widths[layer.prefix][expert], self.settings, []
        quantizer = quantizer_for(bits, chosen.quantizer, chosen.one_bit, scheme=self._scheme(layer, expert))
        exact = load_expert(decoder.model, layer, expert, decoder.device, torch.float32)
        turned = bases(layer, chosen.rotation(layer))
        for projection, matrix in zip(layer.projections.names(), exact.matrices(), strict=True):
            found.append(rounded_in(turned.get(projection), quantizer, matrix, bits, chosen.group_size).dequantize())
        return exact.replaced(found).to(decoder.dtype)

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
        matrices = (self.shards.load(name).to(decoder.device, decoder.dtype) for name in names)
        return load_expert(decoder.model, layer, expert, decoder.device, decoder.dtype).replaced(matrices)

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
