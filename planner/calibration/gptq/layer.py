"""Quantize the experts of one layer with GPTQ, in batches, on several devices, without calibration where it fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from planner.calibration.gptq.experts import CalibratedExpert, ExpertQuantizer, UnusableError
from planner.calibration.reading.decoder import Decoder
from planner.calibration.reading.routed import Routed
from planner.model.layout import MoeLayer
from planner.quantization.settings import QuantizeSettings
from vllm_moeq.format import Scheme

QuantizeBatch = Callable[[list[int], torch.device], list[tuple[int, CalibratedExpert]]]

Kind = tuple[int, Scheme]
"""(an expert's bits, its scheme)."""

BATCH_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}
"""Bytes of Hessians to factor at a time, by kind of device. Their copies take some three times as much."""


def quantize_layer(
    decoder: Decoder,
    layer: MoeLayer,
    widths: Sequence[int],
    routed: Routed,
    settings: QuantizeSettings,
    devices: Sequence[torch.device],
) -> Iterator[tuple[int, CalibratedExpert]]:
    """Quantize all experts of a layer and add the outputs of the quantized experts to ``routed``.

    Experts of one width and scheme go in batches, one batch per device at a time. Results are taken in a fixed order,
    so that the sums do not depend on which batch ends first.

    Args:
        decoder: the model.
        layer: the MoE layer.
        widths: bits per expert.
        routed: the tokens routed to the experts.
        settings: settings of the quantization.
        devices: devices to use, with one thread for each entry; a device may be listed several times.

    Yields:
        (expert, result), not in the order of the experts.

    Raises:
        CheckpointError: a weight cannot be read or is not finite; the message names it.
    """
    kinds = list(zip(widths, settings.storage.schemes(layer.prefix, widths), strict=True))
    counts = [int((routed.ids == expert).sum()) for expert in range(layer.num_experts)]
    batches: deque[list[int]] = deque([expert] for expert, tokens in enumerate(counts) if tokens < settings.min_tokens)
    batches.extend(_batches(layer, kinds, counts, settings.min_tokens, devices[0]))
    math = ExpertQuantizer(decoder, layer, routed, settings)

    def work(batch: list[int], device: torch.device) -> list[tuple[int, CalibratedExpert]]:
        bits, scheme = kinds[batch[0]]
        if counts[batch[0]] < settings.min_tokens:
            reason = f"{counts[batch[0]]} calibration tokens, fewer than {settings.min_tokens}"
            return [(batch[0], math.uncalibrated(batch[0], bits, scheme, device, reason))]
        try:
            return math.calibrated(batch, bits, scheme, device)
        except UnusableError as error:
            if len(batch) == 1:
                return [(batch[0], math.uncalibrated(batch[0], bits, scheme, device, str(error)))]
            return [result for expert in batch for result in work([expert], device)]  # find the expert that fails

    for results in _in_order(work, batches, devices):
        for expert, result in results:
            for places, values in result.outputs:
                routed.add(places, values)
            result.outputs.clear()
            yield expert, result


def _batches(
    layer: MoeLayer, kinds: Sequence[Kind], counts: Sequence[int], least: int, device: torch.device
) -> Iterator[list[int]]:
    """Yield batches of experts that have one width, one scheme and enough tokens, as many experts as fit."""
    largest = 4 * max(columns for _, columns in layer.shapes.values()) ** 2
    size = max(1, BATCH_BYTES[device.type] // largest)
    for kind in sorted(set(kinds), key=lambda found: (found[0], found[1].name)):
        experts = [e for e in range(layer.num_experts) if kinds[e] == kind and counts[e] >= least]
        for begin in range(0, len(experts), size):
            yield experts[begin : begin + size]


def _in_order(
    work: QuantizeBatch, batches: deque[list[int]], devices: Sequence[torch.device]
) -> Iterator[list[tuple[int, CalibratedExpert]]]:
    """Yield the results of all batches in order; as many batches run at a time as there are devices."""
    if len(devices) == 1:
        for batch in batches:
            yield work(batch, devices[0])
        return
    threads = max(1, torch.get_num_threads() // len(devices))
    pools = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) for _ in devices]
    running: deque[Future[list[tuple[int, CalibratedExpert]]]] = deque()
    try:
        for number, batch in enumerate(batches):
            turn = number % len(devices)
            running.append(pools[turn].submit(work, batch, devices[turn]))
            if len(running) == len(devices):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
