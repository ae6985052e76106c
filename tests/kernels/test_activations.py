"""Other activations than silu(gate)·up, and biases, in every kernel: against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.layers import EDGE_ROUTINGS, KINDS, edge_routing, exact, random_layer, random_routing
from tests.kernels.rotations import Rotations, random_rotation, rotated, turned
from vllm_moeq.format import UsageError
from vllm_moeq.kernels import (
    SILU,
    TABLE,
    Activation,
    PackedExperts,
    ReferenceLayer,
    choose,
    make_layer,
)
from vllm_moeq.kernels.activations import FUNCTIONS

BITS = [1, 3, 2, 8]


def kernels() -> list[object]:
    """Return the names of all kernels that compute other activations, with what each needs."""
    marks = {"triton": pytest.mark.slow, "native": pytest.mark.compiler}
    names = [row.name for row in TABLE if row.activations]
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


def inputs(packed: PackedExperts, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights, ids = random_routing(tokens, len(packed.bits), 2)
    x = torch.randn((tokens, packed.hidden), generator=torch.Generator().manual_seed(3))
    return x.to(dtype), weights, ids


def run(name: str, packed: PackedExperts, *arguments: torch.Tensor) -> torch.Tensor:
    device = packed.device
    problem = next(row for row in TABLE if row.name == name).problem(device)
    if problem:
        pytest.skip(problem)
    return make_layer(packed, arguments[0].dtype, name)(*arguments)


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 4e-3) -> None:
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_every_kernel_is_near_float64(kernel: str, kind: str, tokens: int) -> None:
    """Rows fill neither panels nor tiles."""
    packed = random_layer(BITS, 160, 96, 32, kind=KINDS[kind])
    x, weights, ids = inputs(packed, tokens, torch.float16)
    assert_near(run(kernel, packed, x, weights, ids), exact(packed, x, weights, ids))


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("routing", EDGE_ROUTINGS)
def test_edge_routings(kernel: str, kind: str, routing: str) -> None:
    """A bias belongs to an expert: rows without one stay zeros."""
    packed = random_layer(BITS, 128, 64, 64, kind=KINDS[kind])
    x, weights, ids = inputs(packed, 9, torch.float16)
    weights, ids = edge_routing(routing, weights, ids)
    found = run(kernel, packed, x, weights, ids)
    skipped = (ids < 0).all(1)
    assert not found[skipped].any()
    if not skipped.all():
        assert_near(found, exact(packed, x, weights, ids))


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
def test_rotated_experts(kernel: str, kind: str) -> None:
    """A bias is added in the basis of the outputs, which no rotation of inputs changes."""
    packed = random_layer(BITS, 128, 64, 32, kind=KINDS[kind])
    x, weights, ids = inputs(packed, 3, torch.float16)
    before, between = random_rotation(128, 32), random_rotation(64, 32)
    layer = turned(packed, Rotations(before, between))
    expected = exact(packed, rotated(x, before), weights, ids, lambda inner: rotated(inner, between))
    assert_near(run(kernel, layer, x, weights, ids), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_call_equals_an_eager_one(kind: str) -> None:
    layer = ReferenceLayer(random_layer(BITS, 128, 64, 64, kind=KINDS[kind]))
    arguments = inputs(layer.packed, 5, torch.float32)
    compiled = torch.compile(lambda *each: layer(*each) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), layer(*arguments) * 2)


@pytest.mark.parametrize("activation", [*(kind.activation for kind in KINDS.values()), SILU], ids=str)
def test_an_activation_survives_as_numbers(activation: Activation) -> None:
    assert Activation.of(activation.numbers()) == activation


def test_one_word_for_each() -> None:
    assert str(SILU) == "silu with a gate"
    assert str(KINDS["gpt_oss"].activation) == "silu with a gate alpha=1.702 limit=1.5 beta=1"
    assert str(KINDS["nemotron_h"].activation) == "relu2 without a gate"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_number_stays_one(name: str) -> None:
    first = torch.tensor([[math.nan, 1.0], [1.0, math.nan]])
    assert Activation(name, limit=2.0)(first).isnan().all()


@pytest.mark.parametrize(
    ("kind", "found"), [("gemma4", "gelu_tanh with a gate"), ("silu with biases", "biases")], ids=str
)
def test_a_kernel_that_lacks_it_is_refused_by_name(kind: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_layer(BITS, 128, 64, 64, kind=KINDS[kind])
    monkeypatch.setattr("vllm_moeq.kernels.humming.available", lambda: True)
    assert choose(packed).row.activations
    with pytest.raises(UsageError, match=rf"humming kernel takes experts with silu with a gate .*, found {found}"):
        choose(packed, "humming")
