"""Which of the kernels' activations a function of transformers is: its results decide, not its name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator

import torch

from vllm_moeq.kernels import Activation
from vllm_moeq.kernels.activations import FUNCTIONS

REACH, FAR = 30.0, (100.0, 1e3, 1e4)
"""The end of a fine grid of values that are tried, and coarse steps beyond it, where all functions are plain."""

TOLERANCE = 1e-9
"""Largest difference in float64, relative and absolute; GELU and its approximation by tanh differ by 10⁻⁴."""


def recognize(
    function: Callable[[torch.Tensor], torch.Tensor], gated: bool, interleaved: bool, numbers: Collection[float]
) -> Activation | None:
    """Return the activation that computes the same as a function; None if there is none.

    Args:
        function: from [n, gate and up] or [n, up] to [n, intermediate].
        gated: whether it has a gate.
        interleaved: whether gate and up alternate; otherwise gate comes first.
        numbers: the function's own numbers, which may be limits or factors.
    """
    values = _probes(numbers)
    first = torch.stack((values.repeat_interleave(len(values)), values.repeat(len(values))), dim=-1)
    if not gated:
        first = values[:, None]
    # With one neuron each, the order of gate and up is the same in both layouts; with two it is not.
    both = torch.stack((first, first.flip(0))).movedim(0, -1).flatten(-2) if gated else first
    given = both.unflatten(-1, (2, -1)).mT.flatten(-2) if gated and interleaved else both
    with torch.no_grad():
        expected = function(given)
    for candidate in _candidates(gated, numbers):
        found = candidate(both)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            return candidate
    return None


def _probes(numbers: Collection[float]) -> torch.Tensor:
    """Return values that tell functions apart: a grid, far steps, and both sides of each number."""
    sizes = {*FAR, *(number * factor for number in numbers for factor in (0.99, 1.01, 2.0))}
    near = {sign * size for size in sizes for sign in (-1, 1)}
    grid = torch.linspace(-REACH, REACH, 49, dtype=torch.float64, device="cpu")
    return torch.cat((grid, torch.tensor(sorted(near), dtype=torch.float64, device="cpu")))


def _candidates(gated: bool, numbers: Collection[float]) -> Iterator[Activation]:
    """Yield all activations that have nothing but these numbers in them, the plainest first."""
    positive = [float(number) for number in numbers if number > 0]
    for beta, limit, alpha, name in itertools.product((0.0, 1.0), (math.inf, *positive), (1.0, *positive), FUNCTIONS):
        plain = (beta, limit, alpha) == (0.0, math.inf, 1.0)
        if gated or plain or (name == "silu" and (beta, limit) == (0.0, math.inf)):
            yield Activation(name, gated, alpha, limit, beta)
