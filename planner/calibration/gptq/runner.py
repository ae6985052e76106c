"""Run layer tasks with GPTQ, one after the other, each on the output of the quantized layers before it."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planner.calibration.gptq.layer import quantize_layer
from planner.calibration.gptq.linears import quantize_linears
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import remove_hidden
from planner.calibration.reading.routed import finish, outputs_factor, route
from planner.calibration.reading.streams import Streams, advance_original
from planner.calibration.reading.text import CalibrationText
from planner.common.memory import explained_if_out_of_memory
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.quantization.layer_task import Finished, LayerTask, other_tensors, run_task, signs_of, write_layer
from planner.quantization.packed import ExpertReport, pack_expert
from planner.quantization.rows import open_threads
from planner.quantization.runners.base import CONTINUES, Work
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import CheckpointError, linear_values
from vllm_moeq.format.linears import SCALES, WORDS


@dataclass(frozen=True)
class GptqRunner:
    """Quantizes the experts of a model with GPTQ.

    Attributes:
        text: the calibration text.
        threads: number of threads for the work that needs no calibration.
        devices: devices that quantize experts, one batch on each at a time; the first one also runs the model.
        dtype: dtype of weights and hidden states while the model reads.
    """

    text: CalibrationText
    threads: int
    devices: tuple[torch.device, ...]
    dtype: torch.dtype

    def run(self, work: Work) -> Generator[Finished, None, None]:
        """See :class:`planner.quantization.runners.base.Runner`; layers come in order."""
        *layers, rest = work.tasks
        with explained_if_out_of_memory(f"on {self.devices[0].type}; {CONTINUES}; fewer --jobs take less"):
            if any(task in work.pending for task in layers):
                yield from self._layers(layers, work.pending, rest.shard.parent)
            if rest in work.pending:
                yield run_task(rest, self.threads, self.devices[0])
            remove_hidden(rest.shard.parent)

    def _layers(
        self, layers: Sequence[LayerTask], pending: Sequence[LayerTask], folder: Path
    ) -> Generator[Finished, None, None]:
        """Quantize the decoder layers; hidden states are in ``folder`` until the last one is done."""
        with SourceModel(layers[0].source) as model:
            decoder = Decoder(model, read_layout(model), self.devices[0], self.dtype)
            streams = Streams.open(decoder, self.text.tokens, folder, layers[0].settings.asymmetric)
            for index, task in enumerate(layers):
                if task not in pending:
                    continue
                if not streams.has(index):
                    where = streams.quantized.folder
                    raise CheckpointError(
                        f"{where}: expected the input of layer {index}, found none; --no-resume starts anew"
                    )
                yield self._layer(decoder, streams, index, task, last=index + 1 == len(layers))
                streams.drop(index)

    def _layer(self, decoder: Decoder, streams: Streams, index: int, task: LayerTask, last: bool) -> Finished:
        """Quantize one layer, run it, and write the next layer's input before its own shard."""
        began, store, settings = time.monotonic(), streams.quantized, task.settings
        hidden, originals = streams.load(index)
        names = task.linears if settings.linears_calibrated else ()
        linears = quantize_linears(decoder, index, names, settings, hidden, originals)
        with open_threads(self.threads, self.devices[0]) as threads:
            tensors = other_tensors(task, decoder.model, threads, linears.tensors)
        tensors.update(signs_of(task))
        replaced = {name: _values(tensors, name, settings) for name in task.linears}
        reports: dict[int, ExpertReport] = {}
        outputs = None
        exact = None if streams.original is None else advance_original(decoder, index, streams.original, last)
        if task.layer is not None:
            routed = route(decoder, index, hidden, store, replaced, keep_base=exact is not None)
            if exact is not None:
                routed = routed.beside(exact, outputs_factor(decoder, index, hidden, routed, replaced))
            found = quantize_layer(decoder, task.layer, task.widths, routed, settings, self.devices)
            schemes = settings.storage.schemes(task.layer.prefix, task.widths)
            for expert, result in found:
                bits, scheme = task.widths[expert], schemes[expert]
                alone = settings.without_text(bits, scheme)
                named = settings.quantizer_of(scheme) if result.fallback is None else alone
                more, report = pack_expert(task.layer, expert, bits, result.matrices, named, result.fallback)
                tensors.update(more)
                error = None if result.output_error is None else round(result.output_error, 6)
                reports[expert] = replace(report, tokens=result.tokens, output_error=error)
            outputs = routed.outputs
        if not last:
            finish(decoder, index, hidden, store.create(index + 1), outputs, replaced)
            store.complete(index + 1)
        return write_layer(task, tensors, [reports[expert] for expert in sorted(reports)], began, linears.missed)


def _values(tensors: Mapping[str, torch.Tensor], name: str, settings: QuantizeSettings) -> torch.Tensor:
    """Return the dequantized weights of a linear."""
    base = name.removesuffix(".weight")
    return linear_values(tensors[f"{base}.{WORDS}"], tensors[f"{base}.{SCALES}"], settings.linear.bits_of(name))
