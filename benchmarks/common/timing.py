"""These functions time several calls side by side, and measure the memory bandwidth to compare them with.

Each timed call finds its weights outside the L2 cache and its inputs inside it, as in a model where the layer before
has just written them. For this a large buffer is read, then the inputs are copied into place, then the clock starts.
The buffer is read and not written: modified cache lines would be written back during the timed call. On a machine
without a GPU nothing is flushed, and the host's clock is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FLUSH_BYTES = 512 << 20
"""Many times any L2; reading it also takes the GPU longer than the host needs to queue the next call."""
MIN_ROUNDS, MAX_ROUNDS = 3, 200

Action = Callable[[], object]


@dataclass(frozen=True)
class Prepared:
    """A function ready to be timed.

    Attributes:
        run: replays a graph, or calls the function.
        result: where the graph leaves its result; None for a function.
        note: empty for a graph, else why there is none.
    """

    run: Action
    result: torch.Tensor | None
    note: str


def prepare(function: Callable[[], torch.Tensor], device: torch.device, *, capture: bool = True) -> Prepared:
    """Call a function until nothing is left to compile and capture it as a CUDA graph; on failure run it eagerly."""
    if device.type != "cuda":
        function()
        return Prepared(function, None, "no CUDA graph on this device")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    if not capture:
        return Prepared(function, None, "eager: waits for the device")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = function()
    except RuntimeError as error:
        torch.cuda.synchronize(device)  # raises where the device itself is lost
        return Prepared(function, None, f"eager, capture failed: {str(error).splitlines()[0]}")
    return Prepared(graph.replay, result, "")


def interleave(
    runs: Sequence[Action], loads: Sequence[Action], seconds: float, device: torch.device
) -> list[list[list[float]]]:
    """Time functions in turn on each of several inputs.

    Args:
        runs: functions of inputs that lie in fixed places.
        loads: each puts one input in place.
        seconds: to spend, at least MIN_ROUNDS rounds.
        device: where they run.

    Returns:
        [function][input] a list of microseconds, one per round.
    """
    times: list[list[list[float]]] = [[[] for _ in loads] for _ in runs]
    flush = _flusher(device)
    began = time.monotonic()
    for round_ in range(MAX_ROUNDS):
        marks = []
        for number, load in enumerate(loads):
            for turn in range(len(runs)):
                which = (turn + round_ + number) % len(runs)  # nobody always runs after the same one
                flush()
                load()
                marks.append((which, number, _timed(runs[which], device)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for which, number, elapsed in marks:
            times[which][number].append(elapsed())
        if round_ + 1 >= MIN_ROUNDS and time.monotonic() - began > seconds:
            break
    return times


def _timed(run: Action, device: torch.device) -> Callable[[], float]:
    """Run once and return a function that tells the microseconds once the device is done."""
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        return lambda: first.elapsed_time(last) * 1e3
    began = time.perf_counter()
    run()
    spent = (time.perf_counter() - began) * 1e6
    return lambda: spent


_buffers: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}


def _flusher(device: torch.device) -> Action:
    if device.type != "cuda":
        return lambda: None
    if device not in _buffers:
        _buffers[device] = torch.ones(FLUSH_BYTES // 4, device=device), torch.empty((), device=device)
    source, total = _buffers[device]
    return lambda: torch.sum(source, dim=0, out=total)


def summary(per_input: Sequence[Sequence[float]]) -> float:
    """Return the mean over inputs of the median over rounds, microseconds."""
    return statistics.fmean(statistics.median(values) for values in per_input)


def spread(per_input: Sequence[Sequence[float]]) -> float:
    """Return how far the middle half of the rounds reaches, as a share of the median; the mean over inputs."""
    shares = []
    for values in per_input:
        low, middle, high = statistics.quantiles(values, n=4)
        shares.append((high - low) / middle)
    return statistics.fmean(shares)


def bandwidth(device: torch.device) -> dict[str, float]:
    """Measure reading (a sum) and copying (bytes read plus bytes written) of a large buffer, in bytes per second."""
    size = (4 << 30) if device.type == "cuda" else (64 << 20)
    source, target = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    total = torch.empty((), device=device)
    actions: dict[str, tuple[Action, int]] = {
        "read": (lambda: torch.sum(source, dim=0, out=total), size),
        "copy": (lambda: target.copy_(source), 2 * size),
    }
    rates = {}
    for name, (action, moved) in actions.items():
        action()
        marks = [_timed(action, device) for _ in range(11)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates[name] = moved / (statistics.median(mark() for mark in marks) * 1e-6)
    return rates


def launch_floor(device: torch.device) -> float:
    """Return the microseconds of a graph with one tiny kernel: what every captured time below contains."""
    tiny = torch.zeros(1024, device=device)
    prepared = prepare(lambda: tiny + 1, device)
    return summary(interleave([prepared.run], [lambda: None], 0.2, device)[0])
