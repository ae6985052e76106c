"""This benchmark times one MoE layer on the CPU: the native kernel, vLLM's bfloat16 fused MoE, and memory reads.

The native kernel has up to three layers: grids; trellises of the same widths; the same trellises in a rotated basis.

    python benchmarks/kernels/cpu_layer.py --shapes qwen3-30b-a3b,mixtral-8x7b --tokens 1,8,32,128 --mix 2,3 1,2,3 4

The layers run in turn, and each round of calls gets a new routing. So a call finds its experts in memory and not
in a cache, and a disturbance of the machine slows both. Milliseconds are medians. The share of the bandwidth compares
the bytes of a call, which reads each of its experts once, with large reads between the calls. It is given against
their median, and against the best read of the run, which is stricter. vLLM's kernel is the one that its server uses on
this processor. It has all cores, and Intel's OpenMP is preloaded if it is installed, as vLLM advises. Our kernel uses
the same threads.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # Python puts the script's own folder there

from benchmarks.common.cpu import restart_with_openmp
from benchmarks.common.results import environment
from benchmarks.kernels.peers import random_experts
from benchmarks.kernels.routing import MIXES, MODELS, Shape, bytes_moved, route, spread_widths, width_counts
from benchmarks.kernels.trellis import trellis_layers
from vllm_moeq.kernels import PackedExperts, ReferenceLayer
from vllm_moeq.kernels.cpu.layer import ISA_VARIABLE, NativeLayer, instruction_sets

GROUP = 128
SCHEMES = ("trellis", "rotated")
"""The layers besides the grid's, as :func:`trellis_layers` names them."""
READ_BYTES = 256 << 20
"""The probe reads this much: many times a cache."""
PASSES = 4
"""Every row of a layer is measured in several passes, so that a neighbour busy for some seconds does not decide it."""
MIN_ROUNDS, MAX_ROUNDS = 2, 400
"""Limits for the rounds of one pass."""

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Layers:
    """The layers to compare: one of random codes, and bfloat16 weights of the same shape."""

    name: str
    shape: Shape
    bf16: Call
    bf16_kernel: str


class ReadProbe:
    """Reads a large buffer in large pages on all threads, and keeps the rates."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, READ_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._words = torch.frombuffer(self._memory, dtype=torch.int64)
        self._words.fill_(1)
        self.rates: list[float] = []
        for _ in range(5):
            self.read()

    def read(self) -> None:
        """Read once; remember the bytes per second."""
        began = time.perf_counter()
        self._words.sum()
        self.rates.append(READ_BYTES / (time.perf_counter() - began))


def filled(*shape: int) -> torch.Tensor:
    """Return bfloat16 weights; a row's worth of random numbers, again and again, takes no time to make."""
    result = torch.empty(shape, dtype=torch.bfloat16)
    pattern = (torch.randn(shape[-1] * 7, generator=torch.Generator().manual_seed(0)) / shape[-1] ** 0.5).bfloat16()
    flat = result.view(-1)
    for begin in range(0, flat.numel(), pattern.numel()):
        part = flat[begin : begin + pattern.numel()]
        part.copy_(pattern[: part.numel()])
    return result


def vllm_layer(shape: Shape) -> tuple[Call, str]:
    """Build vLLM's fused MoE as its server does on this processor."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts, X86CPUUnquantizedExperts
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    amx = X86CPUUnquantizedExperts._supports_current_device()
    isa = (X86CPUUnquantizedExperts if amx else CPUUnquantizedExperts).isa
    w13 = cpu_prepack_moe_weight(filled(shape.experts, 2 * shape.intermediate, shape.hidden), isa)
    w2 = cpu_prepack_moe_weight(filled(shape.experts, shape.hidden, shape.intermediate), isa)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, w13, w2, None, None, weights, ids, "silu", isa, False)
        return out

    return call, isa


def widths_of(mix: str, experts: int) -> list[int]:
    """Return one width per expert: near the average that :data:`MIXES` asks for, else as many of each."""
    widths = tuple(int(part) for part in mix.split(","))
    average = MIXES.get(mix, (widths, None))[1]
    return spread_widths(width_counts(widths, experts, average))


def inputs(shape: Shape, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw activations and a uniform routing."""
    x = torch.randn((tokens, shape.hidden), generator=torch.Generator().manual_seed(seed)).bfloat16()
    weights, ids = route("uniform", tokens, shape, seed)
    return x, weights, ids


def relative_error(ours: Call, packed: PackedExperts, shape: Shape) -> float:
    """Return the norm of the difference to the reference in float32, over the norm, for two tokens."""
    x, weights, ids = inputs(shape, 2, 99)
    expected = ReferenceLayer(packed)(x.float(), weights, ids).double()
    return float((ours(x, weights, ids).double() - expected).norm() / expected.norm())


@dataclass
class Timing:
    """Measurements for one number of tokens, over all passes."""

    tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    moved: list[int] = field(default_factory=list)
    moved_bf16: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the medians and, per call, the mean bytes."""
        median = {name: statistics.median(times) for name, times in self.seconds.items()}
        ours, bf16 = median["ours"], median["bf16"]
        return {
            "tokens": self.tokens, "ms": ours * 1e3, "bf16_ms": bf16 * 1e3, "speedup_vs_bf16": bf16 / ours,
            "rounds": len(self.seconds["ours"]), "read_bandwidth": statistics.median(self.rates),
            "bytes": statistics.fmean(self.moved), "bf16_bytes": statistics.fmean(self.moved_bf16),
            **{f"{name}_to_grid": median[name] / ours for name in SCHEMES if name in median},
        }  # fmt: skip


def measure(
    timing: Timing, layers: Layers, ours: dict[str, Call], bits: list[int], probe: ReadProbe, seconds: float
) -> None:
    """Time all in turn, for a part of the row's time."""
    calls = {name: (call, timing.seconds.setdefault(name, [])) for name, call in {**ours, "bf16": layers.bf16}.items()}
    done, probed, began = len(timing.seconds["ours"]), len(probe.rates), time.monotonic()
    for round_ in range(-1, MAX_ROUNDS):
        arguments = inputs(layers.shape, timing.tokens, 1000 + done + round_)
        for name in sorted(calls, reverse=bool(round_ % 2)):
            call, times = calls[name]
            start = time.perf_counter()
            call(*arguments)
            if round_ >= 0:  # the one before is a warm-up
                times.append(time.perf_counter() - start)
        if round_ >= 0:
            timing.moved.append(bytes_moved(bits, arguments[2], layers.shape, GROUP))
            timing.moved_bf16.append(bytes_moved([16] * len(bits), arguments[2], layers.shape, GROUP, scale_bytes=0))
        if round_ % 4 == 0:
            probe.read()
        if round_ + 1 >= MIN_ROUNDS and time.monotonic() - began > seconds:
            break
    timing.rates.extend(probe.rates[probed:])


def finish(rows: list[dict[str, Any]], best: float) -> None:
    """Add what depends on the bandwidth."""
    for row in rows:
        rate = row["read_bandwidth"]
        row["floor_ms"], row["bf16_floor_ms"] = row["bytes"] / rate * 1e3, row["bf16_bytes"] / rate * 1e3
        row["bandwidth_share"] = row["floor_ms"] / row["ms"]
        row["share_of_best"] = row["bandwidth_share"] * rate / best


def ratio(row: dict[str, Any], name: str) -> str:
    """Return how much longer another scheme takes than the grid; a dash where it has no such width."""
    found = row.get(f"{name}_to_grid")
    return "–" if found is None else f"{found:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    columns = ("layer", "widths (average)", "tokens", "GB/s", "ms", "floor", "share (of best)", "bf16, ms", "its floor",
               "speedup", "error", *(f"{name} / grid" for name in SCHEMES))  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['mix']} ({row['average_bits']:.2f}) | {row['tokens']} "
            f"| {row['read_bandwidth'] / 1e9:.1f} | {row['ms']:.2f} | {row['floor_ms']:.2f} "
            f"| {row['bandwidth_share']:.0%} ({row['share_of_best']:.0%}) "
            f"| {row['bf16_ms']:.2f} | {row['bf16_floor_ms']:.2f} | {row['speedup_vs_bf16']:.2f} | {row['error']:.1e} "
            f"| {' | '.join(ratio(row, name) for name in SCHEMES)} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every combination and return the result."""
    result: dict[str, Any] = environment(torch.device("cpu"))
    probe = ReadProbe()
    rows: list[dict[str, Any]] = []
    for name in args.shapes.split(","):
        shape = MODELS[name]
        layers = Layers(name, shape, *vllm_layer(shape))
        for mix in args.mix:
            bits = widths_of(mix, shape.experts)
            packed = random_experts(bits, shape, GROUP, torch.device("cpu"))
            ours: dict[str, Call] = {"ours": NativeLayer(packed), **trellis_layers(bits, shape)}
            found = relative_error(ours["ours"], packed, shape)
            del packed
            timings = [Timing(int(tokens)) for tokens in args.tokens.split(",")]
            for _ in range(PASSES):
                for timing in timings:
                    measure(timing, layers, ours, bits, probe, args.seconds / PASSES)
            for row in (timing.row() for timing in timings):
                row.update(shape=name, mix=mix, average_bits=sum(bits) / len(bits), error=found)
                rows.append(row)
                if not args.json:
                    ratios = ", ".join(f"{other} / grid {ratio(row, other)}" for other in SCHEMES)
                    times = f"{row['ms']:.2f} ms, bf16 {row['bf16_ms']:.2f}, {ratios}"
                    print(f"{name} {mix} M={row['tokens']}: {times}", flush=True)
        result["bf16_kernel"] = f"cpu_fused_moe, {layers.bf16_kernel}"
    finish(rows, max(probe.rates))
    isa = os.environ.get(ISA_VARIABLE) or instruction_sets()[-1]
    openmp = "Intel" if "libiomp5" in os.environ.get("LD_PRELOAD", "") else "GNU"
    result.update(threads=torch.get_num_threads(), isa=isa, openmp=openmp)
    result.update(best_read_bandwidth=max(probe.rates), rows=rows)
    return result


def main() -> int:
    """Run the benchmark; 0 where every layer agrees with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b-a3b,mixtral-8x7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", default="1,8,32,128", help="numbers of tokens")
    parser.add_argument("--mix", nargs="+", default=["2,3"], help="widths of one layer each, such as 2,3 or 4")
    parser.add_argument("--seconds", type=float, default=10.0, help=f"per row; at least {PASSES * MIN_ROUNDS} rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    restart_with_openmp()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = run(args)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['isa']}, {result['threads']} threads, {result['openmp']} OpenMP")
        print(f"read bandwidth at best {result['best_read_bandwidth'] / 1e9:.1f} GB/s; bf16: {result['bf16_kernel']}")
        print(table(result["rows"]))
    return int(any(row["error"] > 1e-2 for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
