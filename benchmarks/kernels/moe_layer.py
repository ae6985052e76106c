"""This benchmark times one MoE layer and its rivals in one run.

    python -m benchmarks.kernels.moe_layer --output results

Our kernel is launched once per projection, for experts of several widths; beside it with trellises of 2 bits, alone
and mixed with grids of 3, whatever the mix. The rivals are vLLM's bf16 fused MoE, Marlin
with 4 bits, humming with one width near the same average, and humming with one launch per width. The routing is given,
and weights are random. Before a peer is timed, it is checked at every number of tokens against a float32 product with
its own weights; a peer that is wrong is refused. Microseconds are the mean over several routings of the median over
rounds (see :mod:`benchmarks.common.timing`). On a CPU the same code runs on a tiny layer, and its times mean nothing:

    TRITON_INTERPRET=1 python -m benchmarks.kernels.moe_layer --device cpu --models tiny --tokens 1 16 64 --output dry
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import environment, write
from benchmarks.common.timing import Prepared, bandwidth, interleave, launch_floor, prepare, spread, summary
from benchmarks.kernels.peers import (
    BUILDERS,
    CPU_PEERS,
    GPU_PEERS,
    Peer,
    Setting,
    UnavailableError,
    build,
    random_experts,
)
from benchmarks.kernels.probe import Probe
from benchmarks.kernels.routing import MIXES, MODELS, ROUTINGS, bytes_moved, mix_widths, route
from benchmarks.kernels.time_model import estimate_grids
from vllm_moeq.kernels.reference_layer import ReferenceLayer

TOKENS = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096]
KEY_TOKENS = (1, 16, 4096)
LIMIT = 0.02
"""Largest ‖out − exact‖ / ‖exact‖; roundings to bfloat16 sum up to 0.003 (reference) … 0.008 (Triton's interpreter)."""
CHECKED = 4
"""Rows compared at either end of a batch; the rows of a layer do not depend on each other."""
FATAL = 3
"""Exit status after a kernel broke the device; retry.txt names the peers to go on with if it is known which."""
UNKNOWN, RETRY = "a peer", "retry.txt"


class DeviceLostError(Exception):
    """A kernel broke the device; the argument is the peer's name."""


@dataclass(frozen=True)
class Point:
    """One row of the table."""

    model: str
    mix: str
    routing: str
    tokens: int

    @property
    def stage(self) -> tuple[int, ...]:
        """Rank by what it tells: the key sizes first, then all sizes, other mixes, skewed routing."""
        usual = (self.mix, self.routing) == ("1,2,3", "uniform")
        if usual and self.tokens in KEY_TOKENS:
            return 0, "-tp" in self.model, self.model != "mixtral-8x7b"
        return 1 if usual else 2 if self.routing == "uniform" else 3, "-tp" in self.model, 0


@dataclass
class Inputs:
    """Several routings, and the fixed place that graphs read them from."""

    x: list[torch.Tensor]
    weights: list[torch.Tensor]
    ids: list[torch.Tensor]
    fixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def load(self, number: int) -> None:
        """Put one input in place."""
        for place, source in zip(self.fixed, (self.x[number], self.weights[number], self.ids[number]), strict=True):
            place.copy_(source)


def points(models: list[str], mixes: list[str], routings: list[str], tokens: list[int]) -> list[Point]:
    """Return every combination, the most informative ones first, those of one layer together within a stage."""
    every = [Point(m, x, r, t) for m in models for x in mixes for r in routings for t in tokens]
    layer = {(m, x): number for number, (m, x) in enumerate((m, x) for x in mixes for m in models)}
    return sorted(every, key=lambda p: (p.stage, layer[p.model, p.mix], routings.index(p.routing), p.tokens))


def make_inputs(setting: Setting, routing: str, tokens: int) -> Inputs:
    """Draw sixteen routings for few tokens, where single experts matter, and fewer for many."""
    count = max(2, min(16, 256 // tokens)) if setting.device.type == "cuda" else 2
    routed = [route(routing, tokens, setting.shape, seed) for seed in range(count)]
    generator = torch.Generator(setting.device).manual_seed(tokens)
    shape = (tokens, setting.shape.hidden)
    x = [torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype) for _ in routed]
    weights, ids = ([each.to(setting.device) for each in part] for part in zip(*routed, strict=True))
    return Inputs(x, weights, ids, (x[0].clone(), weights[0].clone(), ids[0].clone()))


def error(peer: Peer, prepared: Prepared, inputs: Inputs, known: dict[int, torch.Tensor]) -> float:
    """Return the relative error of the first and last rows; ``known`` keeps results by the weights' identity."""
    x, weights, ids = inputs.fixed
    tokens = x.shape[0]
    rows = torch.arange(tokens, device=x.device)
    rows = rows[(rows < CHECKED) | (rows >= tokens - CHECKED)]
    if id(peer.weights) not in known:
        exact = ReferenceLayer(peer.weights)  # float32 activations: nothing is rounded
        known[id(peer.weights)] = exact(x[rows].float(), weights[rows], ids[rows]).double()
    if prepared.result is None:
        out = peer.call(x, weights, ids)
    else:
        prepared.result.fill_(float("nan"))
        prepared.run()
        out = prepared.result
    expected = known[id(peer.weights)]
    return float((out[rows].double() - expected).norm() / expected.norm())


class Layer:
    """The peers of one model and mix."""

    def __init__(self, point: Point, args: argparse.Namespace, probes: dict[str, Probe]) -> None:
        device, shape = torch.device(args.device), MODELS[point.model]
        packed = random_experts(mix_widths(point.mix, shape.experts), shape, args.group_size, device)
        self.setting = Setting(shape, packed, args.group_size, getattr(torch, args.dtype), device)
        self.key = (point.model, point.mix)
        self.peers: list[Peer] = []
        self.skipped: dict[str, str] = {}
        for name in args.peers:
            reason = probes[name].problem(args.probe_seconds - (time.monotonic() - args.began)) if probes else ""
            try:
                if reason:
                    raise UnavailableError(reason)
                self.peers.append(build(name, self.setting))
            except UnavailableError as problem:
                self.skip(name, str(problem))
            except Exception as problem:  # whatever a rival raises, the others are measured
                alive(device, name)
                self.skip(name, told(problem))

    def skip(self, name: str, reason: str) -> None:
        """Note and print why a peer is missing."""
        self.skipped[name] = reason
        print(f"  {name} skipped: {reason}", flush=True)

    def measure(self, point: Point, seconds: float) -> dict[str, Any]:
        """Check every peer, time those that are right, and return the row."""
        inputs = make_inputs(self.setting, point.routing, point.tokens)
        device, known = self.setting.device, dict[int, torch.Tensor]()
        rows: dict[str, dict[str, Any]] = {name: {"skipped": reason} for name, reason in self.skipped.items()}
        timed: list[tuple[Peer, Prepared]] = []
        for peer in self.peers:
            row: dict[str, Any] = {"note": peer.note}
            rows[peer.name] = row
            inputs.load(0)
            try:
                prepared = prepare(partial(peer.call, *inputs.fixed), device, capture=peer.capture)
                inputs.load(len(inputs.x) - 1)  # not what the graph was captured with
                row["error"] = error(peer, prepared, inputs, known)
            except Exception as problem:  # as above
                alive(device, peer.name)
                row["skipped"] = told(problem)
                continue
            row["graph"] = not prepared.note
            row["note"] = "; ".join(filter(None, (peer.note, prepared.note)))
            if row["error"] <= LIMIT:  # false for NaN
                timed.append((peer, prepared))
            else:
                row["skipped"] = f"refused: relative error {row['error']:.3g}"
        loads = [partial(inputs.load, number) for number in range(len(inputs.x))]
        try:
            times = interleave([prepared.run for _, prepared in timed], loads, seconds, device)
        except RuntimeError:
            alive(device, UNKNOWN)
            raise
        for (peer, _), series in zip(timed, times, strict=True):
            rows[peer.name].update(us=summary(series), spread=spread(series), rounds=len(series[0]))
        bits, scale = self.setting.packed.bits, self.setting.packed.down.scales.element_size()
        moved = [
            bytes_moved(bits, i, self.setting.shape, self.setting.group_size, scale_bytes=scale) for i in inputs.ids
        ]
        return {
            "model": point.model, "mix": point.mix, "routing": point.routing, "tokens": point.tokens,
            "average_bits": self.setting.average, "widths": {str(w): bits.count(w) for w in sorted(set(bits))},
            "routings": len(inputs.x), "bytes": sum(moved) / len(moved), "peers": rows,
            "estimate_us": self._estimate(point) if point.routing == "uniform" else None,
        }  # fmt: skip

    def _estimate(self, point: Point) -> float | None:
        """Return the estimate of our time on a known card."""
        setting = self.setting
        name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else ""
        return estimate_grids(name, setting.packed.bits, point.tokens, setting.shape, setting.group_size)


def told(problem: Exception) -> str:
    """Return an exception as one line."""
    lines = [type(problem).__name__, *str(problem).strip().splitlines()[:1]]
    return ": ".join(lines)[:300]


def alive(device: torch.device, name: str) -> None:
    """Raise DeviceLostError where the last failure left the device unusable."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as problem:
            raise DeviceLostError(name) from problem


def describe(row: dict[str, Any], peak: float) -> Iterator[str]:
    """Yield the lines that are printed for a row while the benchmark runs."""
    yield f"{row['model']} {{{row['mix']}}} {row['routing']} M={row['tokens']}: {row['bytes'] / 1e6:.1f} MB"
    for name, peer in row["peers"].items():
        if "us" in peer:
            share = f", {row['bytes'] / peer['us'] / 1e-6 / peak:.0%} of bandwidth" if name == "triton" else ""
            if share and row.get("estimate_us"):
                share += f", estimate {row['estimate_us']:.1f} µs"
            note = f" ({peer['note']})" if peer["note"] else ""
            yield f"  {name:18} {peer['us']:10.1f} µs, error {peer['error']:.1e}{share}{note}"
        else:
            yield f"  {name:18} {peer['skipped']}"


def run(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure point after point, saving each, until all are done or the budget is spent."""
    device = torch.device(args.device)
    result["bandwidth"], result["launch_floor_us"] = bandwidth(device), launch_floor(device)
    peak = max(result["bandwidth"].values())
    print(f"bandwidth {peak / 1e9:.0f} GB/s, smallest graph {result['launch_floor_us']:.1f} µs", flush=True)
    probing = device.type == "cuda" and args.probe_seconds > 0
    probes = {name: Probe(name, args.dtype) for name in args.peers} if probing else {}
    layer: Layer | None = None
    try:
        for point in points(args.models, args.mixes, args.routing, args.tokens):
            if time.monotonic() - args.began > args.budget_seconds:
                result["stopped"] = f"after {args.budget_seconds:.0f} s, before {point}"
                print(f"stopped: {result['stopped']}")
                break
            if layer is None or layer.key != (point.model, point.mix):
                layer = None
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                layer = Layer(point, args, probes)
            row = layer.measure(point, args.seconds_per_point)
            result["rows"].append(row)
            print("\n".join(describe(row, peak)), flush=True)
            write(result, args.output, plot=False)
    finally:
        for probe in probes.values():
            probe.stop()


def main() -> int:
    """Run the benchmark; 0 where every point that was reached has a right and timed peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_models = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default_models, metavar="MODEL")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES), metavar="WIDTHS")
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--peers", nargs="+", choices=BUILDERS, metavar="PEER", help=" ".join(BUILDERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds-per-point", type=float, default=1.0)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="stop cleanly after this long")
    parser.add_argument("--probe-seconds", type=float, default=60, help="wait so long for small calls; 0: make none")
    parser.add_argument("--output", type=Path, required=True, help="folder for moe_layer.json, .md and .png")
    args = parser.parse_args()
    args.began = time.monotonic()
    if args.device == "cuda":
        args.device = f"cuda:{torch.cuda.current_device()}"
    args.peers = args.peers or (GPU_PEERS if args.device.startswith("cuda") else CPU_PEERS)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / RETRY).unlink(missing_ok=True)
    result: dict[str, Any] = {**environment(torch.device(args.device)), "peers": args.peers, "rows": []}
    result["settings"] = {"dtype": args.dtype, "group_size": args.group_size, "seconds": args.seconds_per_point}
    status = 0
    try:
        run(args, result)
    except DeviceLostError as lost:
        result["stopped"] = f"{lost} broke the device"
        print(result["stopped"])
        if str(lost) in args.peers:
            (args.output / RETRY).write_text(" ".join(name for name in args.peers if name != str(lost)) + "\n")
        status = FATAL
    write(result, args.output, plot=True)
    refused = [row for row in result["rows"] if any("refused" in p.get("skipped", "") for p in row["peers"].values())]
    if refused:
        print(f"{len(refused)} of {len(result['rows'])} rows have a peer that was refused")
    return status or int(bool(refused) or not result["rows"])


if __name__ == "__main__":
    sys.exit(main())
