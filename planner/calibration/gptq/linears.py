"""Quantize the linears of a layer that are not routed experts with GPTQ, each behind the quantized ones before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from planner.calibration.gptq.moments import Inputs, Moments
from planner.calibration.gptq.stages import ConstantExperts, Stage, find_stages
from planner.calibration.reading.decoder import Decoder, LayerCall
from planner.calibration.reading.routed import batches
from planner.model.source import SourceModel
from planner.quantization.quantizers.base import check_weights
from planner.quantization.quantizers.gptq import GptqSettings
from planner.quantization.quantizers.hessian import NotPositiveDefiniteError
from planner.quantization.quantizers.linear import quantize_linears_gptq
from planner.quantization.quantizers.target import Aim
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import CheckpointError, Linear, linear_values
from vllm_moeq.format.linears import SCALES, WORDS


@dataclass
class CalibratedLinears:
    """The linears of one layer.

    Attributes:
        tensors: checkpoint name → suffix → tensor, of each quantized linear.
        missed: checkpoint name → reason why a linear is not among them.
    """

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    missed: dict[str, str] = field(default_factory=dict)


def quantize_linears(
    decoder: Decoder,
    index: int,
    names: tuple[str, ...],
    settings: QuantizeSettings,
    hidden: torch.Tensor,
    originals: torch.Tensor | None,
) -> CalibratedLinears:
    """Quantize some linears of a layer, in the order in which the layer calls them.

    Args:
        decoder: the model.
        index: the layer's index.
        names: checkpoint names of the linears.
        settings: settings of the quantization.
        hidden: the layer's input behind quantized layers [sequences, length, hidden].
        originals: its input in the original model; None to calibrate symmetrically.

    Raises:
        CheckpointError: a weight cannot be read or is not finite; the message names it.
    """
    result = CalibratedLinears()
    if not names:
        return result
    experts = ConstantExperts()
    with decoder.layer(index, experts if index in decoder.moe else None) as call:
        found = find_stages(decoder, index, names, call, experts, hidden[:1])
        result.missed.update(found.missed)
        weights = _Weights()
        for stage in found.stages:
            try:
                moments = Moments.of(_inputs(decoder, stage, call, weights, hidden, originals)).check()
            except (NotPositiveDefiniteError, ValueError) as error:
                result.missed.update(dict.fromkeys(stage.modules, str(error)))
                continue
            for together in _by_width(stage, settings.linear):
                try:
                    packed = _quantize(decoder.model, together, moments, settings, decoder.device)
                except NotPositiveDefiniteError as error:
                    result.missed.update(dict.fromkeys(together, str(error)))
                    continue
                result.tensors.update(packed)
                for name, tensors in packed.items():
                    values = linear_values(tensors[WORDS], tensors[SCALES], settings.linear.bits_of(name))
                    weights.add(stage.modules[name], values.to(decoder.device, decoder.dtype))
    return result


class _Weights:
    """The exact and the quantized weights of the linears that are done; one of the two is in the modules."""

    def __init__(self) -> None:
        self.known: list[tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]] = []

    def add(self, module: torch.nn.Linear, values: torch.Tensor) -> None:
        """Note the quantized weights of a linear."""
        self.known.append((module, module.weight, torch.nn.Parameter(values, requires_grad=False)))

    def use(self, quantized: bool) -> None:
        """Put the quantized or the exact weights into the modules."""
        for module, exact, rounded in self.known:
            module.weight = rounded if quantized else exact


def _inputs(
    decoder: Decoder,
    stage: Stage,
    call: LayerCall,
    weights: _Weights,
    hidden: torch.Tensor,
    originals: torch.Tensor | None,
) -> Iterator[Inputs]:
    """Yield the inputs of a stage's linears for all tokens that are finite in both models."""
    with stage.reader(call) as read:
        for begin, part in batches(hidden, decoder.rows):
            exact = None
            if originals is not None:
                weights.use(quantized=False)
                exact = read(originals[begin : begin + part.shape[0]])
            weights.use(quantized=True)
            inputs = read(part)
            usable = torch.isfinite(inputs).all(dim=1)
            if exact is not None:
                usable &= torch.isfinite(exact).all(dim=1)
            if not bool(usable.all()):
                inputs, exact = inputs[usable], None if exact is None else exact[usable]
            if inputs.shape[0]:
                yield Inputs(inputs, exact)


def _by_width(stage: Stage, spec: Linear) -> Iterator[list[str]]:
    """Yield the linears of a stage that share a width: they share the work on their moments."""
    for bits in sorted({spec.bits_of(name) for name in stage.modules}):
        yield [name for name in stage.modules if spec.bits_of(name) == bits]


def _quantize(
    model: SourceModel, names: Sequence[str], moments: Moments, settings: QuantizeSettings, device: torch.device
) -> dict[str, dict[str, torch.Tensor]]:
    """Quantize linears of one width and one input together; return name → suffix → tensor."""
    weights = [model.shards.load(name).to(device) for name in names]
    for name, weight in zip(names, weights, strict=True):
        try:
            check_weights(weight)
        except CheckpointError as error:
            raise CheckpointError(f"{model.shards.place(name)}: {error}") from None
    spec, tuned = settings.linear.alone(names[0]), settings.gptq or GptqSettings()
    aim = None if moments.shift is None else Aim(moments.shift[None])
    packed = quantize_linears_gptq(weights, moments.second, aim, spec, tuned)
    return dict(zip(names, packed, strict=True))
