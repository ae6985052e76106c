"""Quantize some experts of a layer with GPTQ, each on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from planner.calibration.gptq.moments import Inputs, Moments
from planner.calibration.gptq.solve import solve_in
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.expert import ExpertWeights, load_expert
from planner.calibration.reading.routed import Routed
from planner.model.layout import MoeLayer
from planner.quantization.packed import PackedMatrix, pack_matrix
from planner.quantization.quantizers import QuantizedMatrix, quantizer_for
from planner.quantization.quantizers.base import check_weights
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError
from planner.quantization.quantizers.rotated import Basis, bases, rounded_in
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import CheckpointError, Scheme


class UnusableError(Exception):
    """GPTQ cannot use the second moments; the message says why."""


@dataclass(frozen=True)
class CalibratedExpert:
    """One quantized expert.

    Attributes:
        matrices: projection → packed matrix.
        outputs: (tokens [n], weighted outputs [n, hidden]) of the quantized expert, in parts.
        tokens: number of calibration tokens routed to it.
        output_error: ‖Y − Ŷ‖ / ‖Y‖ on these tokens, with Ŷ its weighted outputs and Y those of the exact expert on the
            original's inputs; what Ŷ makes up for besides counts as an error. None without tokens.
        fallback: reason why it was quantized without calibration; None if it was calibrated.
    """

    matrices: dict[str, PackedMatrix]
    outputs: list[tuple[torch.Tensor, torch.Tensor]]
    tokens: int
    output_error: float | None
    fallback: str | None


@dataclass(frozen=True)
class ExpertQuantizer:
    """Quantizes the experts of one layer.

    Attributes:
        decoder: the model.
        layer: the MoE layer.
        routed: the tokens routed to its experts.
        settings: settings of the quantization.
    """

    decoder: Decoder
    layer: MoeLayer
    routed: Routed
    settings: QuantizeSettings

    @cached_property
    def bases(self) -> dict[str, Basis]:
        """The rotations of the projections' inputs, by projection; none without a rotation."""
        return bases(self.layer, self.settings.rotation(self.layer))

    def calibrated(
        self, batch: list[int], bits: int, scheme: Scheme, device: torch.device
    ) -> list[tuple[int, CalibratedExpert]]:
        """Quantize experts of one width and scheme together: gate and up first, then down on the outputs of these two.

        Raises:
            UnusableError: GPTQ cannot use the inputs of some expert in the batch.
            CheckpointError: a weight is not finite.
        """
        experts = [self._load(expert, device) for expert in batch]
        both = torch.stack([expert.stacked() for expert in experts])
        moments = Moments.stack(Moments.of(self._outer(expert, device)) for expert in batch)
        first = self._solve(both, moments, bits, scheme, self.layer.projections.gate)
        parts = [_parts(codes, expert) for codes, expert in zip(first, experts, strict=True)]
        halves = [
            expert.replaced((*(codes.dequantize() for codes in own), expert.down))
            for own, expert in zip(parts, experts, strict=True)
        ]
        inner = (self._inner(*found, device) for found in zip(batch, halves, experts, strict=True))
        moments = Moments.stack(map(Moments.of, inner))
        stacked = torch.stack([expert.down for expert in experts])
        downs = self._solve(stacked, moments, bits, scheme, self.layer.projections.down)
        found = zip(batch, experts, parts, downs, strict=True)
        return [(name, self._result(name, exact, (*own, down), device)) for name, exact, own, down in found]

    def uncalibrated(
        self, expert: int, bits: int, scheme: Scheme, device: torch.device, reason: str
    ) -> CalibratedExpert:
        """Quantize an expert by its weights alone.

        Raises:
            CheckpointError: a weight is not finite.
        """
        chosen = self.settings
        quantizer = quantizer_for(bits, chosen.quantizer, chosen.one_bit, chosen.zero_points, scheme)
        exact = self._load(expert, device)
        matrices = tuple(
            rounded_in(self.bases.get(name), quantizer, weight, bits, chosen.group_size)
            for name, weight in zip(self.layer.projections.names(), exact.matrices(), strict=True)
        )
        return self._result(expert, exact, matrices, device, reason)

    def _load(self, expert: int, device: torch.device) -> ExpertWeights:
        found = load_expert(self.decoder.model, self.layer, expert, device, torch.float32)
        for projection, weight in zip(self.layer.projections.names(), found.matrices(), strict=True):
            try:
                check_weights(weight)
            except CheckpointError as error:
                place = self.decoder.model.shards.place(self.layer.weight(expert, projection))
                raise CheckpointError(f"{place}: {error}") from None
        return found

    def _outer(self, expert: int, device: torch.device) -> Iterator[Inputs]:
        """Yield the inputs of an expert's gate and up projections.

        With the original's inputs, a token counts by the router's weight. Its square would be the weight in the layer's
        squared error, but the router of the final model gives other weights: the first power measured best.
        """
        for inputs, weights, places in self.routed.chunks(expert, device):
            original = self.routed.original(places, device)
            yield Inputs(inputs, original, None if original is None else weights)

    def _inner(self, expert: int, half: ExpertWeights, exact: ExpertWeights, device: torch.device) -> Iterator[Inputs]:
        """Yield the inputs of an expert's down projection, whose gate and up projections are quantized.

        Its outputs are added to the layer's, so it also makes up for what the layer lost before its experts.
        """
        activation = self.decoder.activation
        for inputs, weights, places in self.routed.chunks(expert, device):
            original, own = self.routed.original(places, device), half.inner(inputs.float(), activation)
            if original is None:
                yield Inputs(own, None)
            else:
                yield Inputs(own, exact.inner(original.float(), activation), weights, self.routed.lost(places, device))

    def _solve(
        self, weights: torch.Tensor, moments: Moments, bits: int, scheme: Scheme, projection: str
    ) -> Sequence[QuantizedMatrix]:
        chosen, basis = self.settings, self.bases.get(projection)
        quantizer, tuned = chosen.quantizer_of(scheme), chosen.gptq or GptqSettings()
        try:
            return solve_in(basis, weights, moments, bits, chosen.group_size, quantizer, tuned, chosen.zero_points)
        except NotPositiveDefiniteError as error:
            raise UnusableError(str(error)) from None

    def _result(
        self,
        expert: int,
        exact: ExpertWeights,
        matrices: tuple[QuantizedMatrix, ...],
        device: torch.device,
        fallback: str | None = None,
    ) -> CalibratedExpert:
        """Run the quantized and the exact expert on its tokens; return the packed expert with outputs and error."""
        quantized = exact.replaced(matrix.dequantize() for matrix in matrices)
        activation = self.decoder.activation
        outputs, tokens, difference, size = [], 0, 0.0, 0.0
        for inputs, weights, places in self.routed.chunks(expert, device):
            x, originals = inputs.float(), self.routed.original(places, device)
            aim = x if originals is None else originals.float()
            output = quantized(x, activation).mul_(weights[:, None])
            wanted = exact(aim, activation).mul_(weights[:, None])
            outputs.append((places, output.cpu()))
            tokens += places.numel()
            size += float(wanted.square().sum(dtype=torch.float64))
            difference += float(wanted.sub_(output).square_().sum(dtype=torch.float64))
        packed = {
            projection: pack_matrix(weight, matrix)
            for projection, weight, matrix in zip(
                self.layer.projections.names(), exact.matrices(), matrices, strict=True
            )
        }
        return CalibratedExpert(packed, outputs, tokens, (difference / size) ** 0.5 if size else None, fallback)


def _parts(codes: QuantizedMatrix, expert: ExpertWeights) -> tuple[QuantizedMatrix, ...]:
    """Return the quantized matrices before the activation, which were quantized as one."""
    ends = list(accumulate(len(matrix) for matrix in expert.first))
    return tuple(codes.rows(slice(begin, end)) for begin, end in pairwise((0, *ends)))
