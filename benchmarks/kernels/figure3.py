"""This benchmark measures the inference cost of two allocations at equal average bits: the paper's Figure 3.

    python -m benchmarks.kernels.figure3 --statistics mixtral-8x7b-statistics.json --output results

PMQ minimises Σ frequency · weight^1.5 · loss(bits) per layer, with at least one expert at 3 bits and one at 2. Experts
which are used often and weigh much get more bits. The paper's method gives more bits to experts with a small router
norm, and these are rarely used. The statistics hold no router norms, so rising frequency stands in for rising norm.
Two more orders show how much an order matters with the paper's counts: falling frequency, and random.

Bytes are exact on any machine: they are the probability that a batch uses an expert times the expert's bytes. Times
need a GPU. The routing of the timed calls uses every expert exactly as often as measured.

The statistics are JSON with "frequency" [layers][experts] (times selected), "weight" [layers][experts] (summed gate
probability) and "loss" [layers][experts][3] (error of the block's output with that expert alone at 1, 2, 3 bits).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import environment
from benchmarks.common.timing import interleave, prepare, summary
from benchmarks.kernels.peers import Setting, build, random_experts
from benchmarks.kernels.routing import MODELS, Shape, bytes_moved, expected_bytes, route_by_frequency, visit_probability
from planner.allocation import level_counts, solve_budget

WIDTHS = (1, 2, 3)
WEIGHT_POWER = 1.5
"""PMQ's exponent of the gate weights; those of frequency and loss are 1."""
STAND_IN = (
    "Router norms are not published with these statistics: the order of rising frequency stands in for the paper's "
    "order of rising router norm. This shows the paper's mechanism, not its exact allocation."
)
BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer of the statistics, see above."""

    frequency: Sequence[float]
    weight: Sequence[float]
    loss: Sequence[Sequence[float]]


def read(path: Path) -> list[LayerStatistics]:
    """Read the statistics of every layer."""
    table = json.loads(path.read_text())
    return [LayerStatistics(*row) for row in zip(table["frequency"], table["weight"], table["loss"], strict=True)]


def pmq_widths(layer: LayerStatistics, total_bits: int) -> list[int]:
    """Return PMQ's widths under a limit on their sum."""
    importance = [
        f / sum(layer.frequency) * (w / sum(layer.weight)) ** WEIGHT_POWER
        for f, w in zip(layer.frequency, layer.weight, strict=True)
    ]
    costs = [[factor * loss for loss in losses] for factor, losses in zip(importance, layer.loss, strict=True)]
    return solve_budget(costs, WIDTHS, total_bits, {3: 1, 2: 1})


def by_order(order: Sequence[int], average: float) -> list[int]:
    """Give experts the paper's counts of widths, the widest to the first of ``order``."""
    counts = level_counts(len(order), WIDTHS, average)
    descending = [width for width in sorted(counts, reverse=True) for _ in range(counts[width])]
    result = [0] * len(order)
    for expert, width in zip(order, descending, strict=True):
        result[expert] = width
    return result


def allocations(layer: LayerStatistics, average: float, seed: int) -> dict[str, list[int]]:
    """Return the widths of each method; all sum to the same number of bits or the benchmark would compare sizes.

    Raises:
        ValueError: they do not.
    """
    experts = len(layer.frequency)
    rising = sorted(range(experts), key=lambda expert: layer.frequency[expert])
    found = {
        "paper": by_order(rising, average),
        "frequent-first": by_order(rising[::-1], average),
        "random": by_order(random.Random(seed).sample(range(experts), experts), average),
    }
    found = {"pmq": pmq_widths(layer, sum(found["paper"])), **found}
    if len({sum(bits) for bits in found.values()}) != 1:
        raise ValueError(f"the methods spend different numbers of bits: {found}")
    return found


def bytes_table(layers: Sequence[LayerStatistics], average: float, shape: Shape, group: int) -> list[dict[str, Any]]:
    """Return expected bytes of a batch's experts, mean over layers, for each method and batch size."""
    sums: dict[tuple[str, int], float] = {}
    for number, layer in enumerate(layers):
        visit = visit_probability(layer.frequency, shape.top_k)
        for method, bits in allocations(layer, average, number).items():
            for tokens in BATCHES:
                moved = expected_bytes(bits, visit, tokens, shape, group)
                sums[method, tokens] = sums.get((method, tokens), 0.0) + moved / len(layers)
    return [
        {"average": average, "method": method, "tokens": tokens, "bytes": moved, "ratio": moved / sums["paper", tokens]}
        for (method, tokens), moved in sums.items()
    ]


def unevenness(layer: LayerStatistics) -> float:
    """Return the standard deviation of the frequencies over their mean."""
    return statistics.pstdev(layer.frequency) / statistics.fmean(layer.frequency)


def chosen_layers(layers: Sequence[LayerStatistics]) -> list[int]:
    """Return the layers with the most uneven, the median and the most even use of experts."""
    order = sorted(range(len(layers)), key=lambda number: -unevenness(layers[number]))
    return [order[0], order[len(order) // 2], order[-1]]


def time_layer(
    layer: LayerStatistics, number: int, tokens: int, args: argparse.Namespace, settings: dict[str, Setting]
) -> dict[str, Any]:
    """Time one layer under every method on the same inputs, interleaved."""
    device, shape = torch.device(args.device), MODELS[args.model]
    count = max(2, min(64, 64 // tokens)) if device.type == "cuda" else 2
    routed = route_by_frequency(layer.frequency, count * tokens, shape.top_k, number)
    inputs = list(zip(*(part.to(device).split(tokens) for part in routed), strict=True))
    generator = torch.Generator(device).manual_seed(number)
    x = torch.randn((tokens, shape.hidden), generator=generator, device=device).to(torch.bfloat16)
    weights, ids = inputs[0][0].clone(), inputs[0][1].clone()

    def load(which: int) -> None:
        weights.copy_(inputs[which][0])
        ids.copy_(inputs[which][1])

    runs: list[Callable[[], object]] = []
    for setting in settings.values():
        peer = build(args.backend, setting)
        runs.append(prepare(partial(peer.call, x, weights, ids), device, capture=peer.capture).run)
    times = interleave(runs, [partial(load, which) for which in range(count)], args.seconds_per_point, device)
    row: dict[str, Any] = {"layer": number, "tokens": tokens, "unevenness": unevenness(layer), "methods": {}}
    for (method, setting), series in zip(settings.items(), times, strict=True):
        bits, group = setting.packed.bits, setting.group_size
        moved = [bytes_moved(bits, each, shape, group) for _, each in inputs]
        row["methods"][method] = {"us": summary(series), "bytes": sum(moved) / count, "bits": list(bits)}
    return row


def times_table(layers: Sequence[LayerStatistics], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the chosen layers; every method's layer is built once."""
    device, shape, rows = torch.device(args.device), MODELS[args.model], []
    for number in args.layers if args.layers is not None else chosen_layers(layers):
        found = allocations(layers[number], args.avg_bits[0], number)
        settings = {
            method: Setting(
                shape, random_experts(bits, shape, args.group_size, device), args.group_size, torch.bfloat16, device
            )
            for method, bits in found.items()
        }
        rows += [time_layer(layers[number], number, tokens, args, settings) for tokens in args.tokens]
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return bytes, and times where there are any, as Markdown."""
    lines = ["# PMQ against the paper's mechanism", "", f"{result['device']}, {result['date']}. {STAND_IN}", ""]
    lines += ["## Expected bytes of experts per layer, mean over layers, and in brackets over the paper's", ""]
    lines += ["| average bits | method | " + " | ".join(f"M = {tokens}, MB" for tokens in BATCHES) + " |"]
    lines += ["| ---: | --- " + "| ---: " * len(BATCHES) + "|"]
    for average in dict.fromkeys(row["average"] for row in result["bytes"]):
        for method in dict.fromkeys(row["method"] for row in result["bytes"]):
            cells = [
                f"{row['bytes'] / 1e6:.2f} ({row['ratio']:.4f})"
                for row in result["bytes"]
                if (row["average"], row["method"]) == (average, method)
            ]
            lines.append(f"| {average} | {method} | " + " | ".join(cells) + " |")
    lines += ["", "Tokens of a batch are taken as independent."]
    if not result["times"]:
        return "\n".join([*lines, "", "No times: they need a GPU.", ""])
    lines += ["", f"## Time of one layer with the backend {result['backend']}, {result['timed_bits']} bits", ""]
    lines += ["Layers by how unevenly their experts are used (standard deviation over mean).", ""]
    lines += ["| layer | unevenness | M | method | µs | over the paper's | bytes over the paper's |"]
    lines += ["| ---: | ---: | ---: | --- | ---: | ---: | ---: |"]
    for row in result["times"]:
        base = row["methods"]["paper"]
        for method, found in row["methods"].items():
            lines.append(
                f"| {row['layer']} | {row['unevenness']:.3f} | {row['tokens']} | {method} | {found['us']:.1f} "
                f"| {found['us'] / base['us']:.4f} | {found['bytes'] / base['bytes']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compute bytes, time layers where there is a GPU, write figure3.json and figure3.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for figure3.json and figure3.md")
    parser.add_argument("--avg-bits", nargs="+", type=float, default=[2.5, 2.25, 2.0, 1.75], help="the first is timed")
    parser.add_argument("--layers", nargs="+", type=int, help="to time; default: most uneven, median, most even")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 4096], help="batch sizes to time")
    parser.add_argument("--model", choices=MODELS, default="mixtral-8x7b", help="shape that the statistics are for")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds-per-point", type=float, default=1.0)
    parser.add_argument("--backend", default="triton", choices=["triton", "humming-classes", "reference"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, help="default: only on a GPU")
    args = parser.parse_args()
    if args.device == "cuda":
        args.device = f"cuda:{torch.cuda.current_device()}"
    layers, device = read(args.statistics), torch.device(args.device)
    shape = MODELS[args.model]
    table = [row for average in args.avg_bits for row in bytes_table(layers, average, shape, args.group_size)]
    result = {**environment(device), "stand_in": STAND_IN, "backend": args.backend, "bytes": table, "times": []}
    result["timed_bits"] = args.avg_bits[0]
    args.output.mkdir(parents=True, exist_ok=True)
    for timed in (False, True):  # the bytes are on disk before anything can go wrong on the GPU
        if timed and (args.time or (args.time is None and device.type == "cuda")):
            result["times"] = times_table(layers, args)
        (args.output / "figure3.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.output / "figure3.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
