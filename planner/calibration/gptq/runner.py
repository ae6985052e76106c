"""Run layer tasks with GPTQ, one after the other, each on the output of the quantized layers before it."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planner.calibration.gptq.layer import quantize_layer
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.hidden import HiddenStates, remove_hidden
from planner.calibration.reading.routed import finish, first_hidden, route
from planner.calibration.reading.text import CalibrationText
from planner.common.memory import explained_if_out_of_memory
from planner.model.layout import read_layout
from planner.model.source import SourceModel
from planner.quantization.layer_task import Finished, LayerTask, other_tensors, run_task, write_layer
from planner.quantization.packed import ExpertReport, pack_expert
from planner.quantization.rows import open_threads
from planner.quantization.runners.base import CONTINUES, Work
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
            store = first_hidden(decoder, self.text.tokens, folder)
            for index, task in enumerate(layers):
                if task not in pending:
                    continue
                if not store.has(index):
                    raise CheckpointError(
                        f"{store.folder}: expected the input of layer {index}, found none; --no-resume starts anew"
                    )
                yield self._layer(decoder, store, index, task, last=index + 1 == len(layers))
                store.drop(index)

    def _layer(self, decoder: Decoder, store: HiddenStates, index: int, task: LayerTask, last: bool) -> Finished:
        """Quantize one layer, run it, and write the next layer's input before its own shard."""
        began = time.monotonic()
        with open_threads(self.threads, self.devices[0]) as threads:
            tensors = other_tensors(task, decoder.model, threads)
        replaced = {}
        for name in task.linears:
            base = name.removesuffix(".weight")
            words, scales = tensors[f"{base}.{WORDS}"], tensors[f"{base}.{SCALES}"]
            replaced[name] = linear_values(words, scales, task.settings.linear.bits_of(name))
        hidden = store.load(index)
        reports: dict[int, ExpertReport] = {}
        outputs = None
        if task.layer is not None:
            routed = route(decoder, index, hidden, store, replaced)
            found = quantize_layer(decoder, task.layer, task.widths, routed, task.settings, self.devices)
            for expert, result in found:
                bits = task.widths[expert]
                named = task.settings.quantizer if result.fallback is None else task.settings.without_text(bits)
                more, report = pack_expert(task.layer, expert, bits, result.matrices, named, result.fallback)
                tensors.update(more)
                error = None if result.output_error is None else round(result.output_error, 6)
                reports[expert] = replace(report, tokens=result.tokens, output_error=error)
            outputs = routed.outputs
        if not last:
            finish(decoder, index, hidden, store.create(index + 1), outputs, replaced)
            store.complete(index + 1)
        return write_layer(task, tensors, [reports[expert] for expert in sorted(reports)], began)
