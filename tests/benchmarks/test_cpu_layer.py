"""The layers of trellises that the benchmark of the CPU kernel times beside the grid's."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cpu_layer import SCHEMES, Timing, inputs, ratio
from benchmarks.kernels.routing import MODELS
from benchmarks.kernels.trellis import trellis_layers
from vllm_moeq.kernels.cpu import build

pytestmark = [pytest.mark.skipif(bool(build.problem()), reason=build.problem() or "it is there"), pytest.mark.compiler]
TINY = MODELS["tiny"]


def test_layers_of_the_grid_s_widths() -> None:
    layers = trellis_layers([1, 2, 3, 4, 2, 2, 2, 2], TINY)
    assert tuple(layers) == SCHEMES
    results = [layer(*inputs(TINY, 3, 0)) for layer in layers.values()]
    assert all(result.isfinite().all() and result.any() for result in results)
    assert not torch.equal(*results)


def test_a_width_that_a_trellis_does_not_have() -> None:
    assert trellis_layers([2] * 7 + [8], TINY) == {}


def test_the_ratio_to_the_grid() -> None:
    timing = Timing(1, seconds={"ours": [0.1, 0.2, 0.3], "bf16": [1.0], "trellis": [0.5]})
    timing.moved, timing.moved_bf16, timing.rates = [1], [1], [1.0]
    row = timing.row()
    assert [ratio(row, name) for name in SCHEMES] == ["2.50", "–"]
