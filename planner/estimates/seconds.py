"""Estimate durations on this machine by timing a small piece of the work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from planner.calibration.measures import MEASURES
from planner.calibration.reading.decoder import ROWS
from planner.estimates.memory import Reading
from planner.estimates.serving import text_config
from planner.model.layout import Layout, MoeLayer
from planner.model.source import SourceModel
from planner.quantization.quantizers import quantizer_for
from planner.quantization.quantizers.hqq import BLOCK_WEIGHTS
from planner.quantization.rows import TILES
from planner.quantization.settings import QuantizeSettings
from planner.sensitivity import max_variance_of_rows
from vllm_moeq.format import GRID, TRELLIS_SCHEME, WHOLE_ROW, Scheme

LONG = 1.0
"""Seconds of a run that is not repeated: the search for a trellis without the native library is slow."""

SIDE = 1024
"""Side of the square matrices whose product is timed, and the most columns of which a trellis is."""


def rounding_seconds(
    layout: Layout,
    experts: Mapping[str, Sequence[int]],
    settings: QuantizeSettings,
    threads: int,
    device: torch.device,
    grids: bool = True,
) -> float:
    """Return the seconds to quantize all experts without calibration on ``threads`` threads or GPUs.

    Without ``grids`` only other schemes count: what the search for their codes takes with calibration too.
    """
    columns = max(columns for layer in layout.layers for _, columns in layer.shapes.values())
    weights: Counter[tuple[int, Scheme]] = Counter()
    for layer in layout.layers:
        widths = experts[layer.prefix]
        for bits, scheme in zip(widths, settings.storage.schemes(layer.prefix, widths), strict=True):
            if grids or scheme is not GRID:
                weights[bits, scheme] += layer.weights_per_expert
    return sum(count / _rate(*kind, columns, settings, device) for kind, count in weights.items()) / threads


def searching_seconds(layout: Layout, measures: Sequence[str], widths: Sequence[int], device: torch.device) -> float:
    """Return the seconds of some measures to search a trellis of each width for the weights that they try."""
    weights = sum(MEASURES[name].searched(layout) for name in measures)
    able = [bits for bits in widths if bits in TRELLIS_SCHEME.widths] if weights else []
    columns, settings = max(columns for _, columns in layout.layers[0].shapes.values()), QuantizeSettings()
    rates = [_rate(bits, TRELLIS_SCHEME, columns, settings, device) for bits in able]
    return sum(weights / rate for rate in rates) / torch.get_num_threads()


def reading_seconds(
    config: Mapping[str, Any], layout: Layout, reading: Reading, passes: float, device: torch.device
) -> float:
    """Return the seconds to run a model ``passes`` times over a text, and to run GPTQ if ``reading`` asks for it."""
    text, layer = text_config(config), layout.layers[0]
    hidden = int(text.get("hidden_size") or 0)
    chosen = int(text.get("num_experts_per_tok") or text.get("moe_k") or 1)
    used = len(layout.layers) * chosen * layer.weights_per_expert
    attention = layout.num_layers * (4 * hidden * hidden + 2 * reading.length * hidden)
    operations = 2.0 * passes * reading.tokens * (used + attention)
    if reading.gptq:
        operations += len(layout.layers) * _gptq_operations(layer, chosen * reading.tokens, reading)
        if reading.asymmetric:  # the original model runs once more, and its experts' gate and up for their inputs
            operations += 4.0 * reading.tokens * (used + attention)
    return operations / _product_rate(device)


def variance_seconds(model: SourceModel, layout: Layout, threads: int) -> float:
    """Return the seconds to compute MaxVar of all experts. One expert's matrix is read and timed."""
    layer = layout.layers[0]
    name = layer.weight(0, layer.projections.gate)
    rows, columns = layer.shapes[layer.projections.gate]

    def work() -> None:
        max_variance_of_rows(lambda begin, end: model.shards.read_rows(name, begin, end), rows, columns)

    return layout.num_experts * _seconds(work, torch.device("cpu")) / threads


def _gptq_operations(layer: MoeLayer, tokens: int, reading: Reading) -> float:
    """Return the operations of GPTQ in one layer.

    They are moments, their factorization, the target, and passing on errors, which each sweep does twice. Down
    projections also have moments of what the layer lost.
    """
    more = reading.streams - 1
    rows, columns = layer.shapes[layer.projections.down]
    total = 2.0 * more * tokens * rows * columns
    for rows, columns in layer.shapes.values():
        solve = (1 + 2 * reading.sweeps + 2 * more) * 2.0 * rows * columns**2
        total += reading.streams * 2.0 * tokens * columns**2 + layer.num_experts * (columns**3 + solve)
    return total


def _rate(bits: int, scheme: Scheme, columns: int, settings: QuantizeSettings, device: torch.device) -> float:
    """Return the number of weights that one thread quantizes per second."""
    if scheme is GRID:
        rows = max(1, BLOCK_WEIGHTS // columns)
    else:
        columns = min(columns, SIDE)  # the time of a weight hardly depends on them
        rows = TILES * scheme.row_step
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    quantizer = quantizer_for(bits, settings.quantizer, settings.one_bit, settings.zero_points, scheme)
    group = columns if settings.group_size == WHOLE_ROW else settings.group_size
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return weight.numel() / _seconds(lambda: quantizer(weight, bits, group), device)
    finally:
        torch.set_num_threads(threads)


def _product_rate(device: torch.device) -> float:
    """Return the operations per second of a matrix product with at most as many rows as calibration uses."""
    left, right = torch.ones(min(ROWS, SIDE), SIDE, device=device), torch.ones(SIDE, SIDE, device=device)
    return 2.0 * left.shape[0] * SIDE**2 / _seconds(lambda: left @ right, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of three runs, or of the first if it takes long."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
        if found[-1] > LONG:
            break
    return min(found)
