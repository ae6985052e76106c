"""Random layers and their exact results, for the tests of every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_moeq.format import GRID, ROW_SCALE, TRELLIS, TRELLIS_SCHEME, Scheme, pack
from vllm_moeq.kernels import SILU, Activation, LayerKernel, PackedExperts, PackedMatrices, ragged

Coding = tuple[Scheme, int]
"""A scheme and a width."""


@dataclass(frozen=True)
class Kind:
    """What experts compute besides products.

    Attributes:
        activation: between the projections; limits are small, so that random values reach them.
        biased: whether both projections have biases.
    """

    activation: Activation
    biased: bool = False


KINDS: Mapping[str, Kind] = {
    "deepseek_v4": Kind(Activation(limit=1.0)),
    "minimax_m3": Kind(Activation(alpha=1.702, limit=1.5, beta=1.0)),
    "gpt_oss": Kind(Activation(alpha=1.702, limit=1.5, beta=1.0), biased=True),
    "gemma4": Kind(Activation("gelu_tanh")),
    "nemotron_h": Kind(Activation("relu2", gated=False)),
    "silu with biases": Kind(SILU, biased=True),
    "silu without a gate, with biases": Kind(Activation(gated=False), biased=True),
}
"""A model that computes it, or a description."""


def random_matrices(
    bits: Sequence[int],
    rows: int,
    columns: int,
    group_size: int,
    offset: int = 0,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> PackedMatrices:
    """Random codes, with weights of about unit variance over the square root of the columns."""
    layout = ragged(bits, rows, columns, group_size, offset)
    generator = torch.Generator().manual_seed(seed)
    words = [pack(torch.randint(0, 2**b, (rows, columns), generator=generator), b).flatten() for b in bits]
    steps = torch.tensor([2.0**b - 1 for b in bits])[:, None, None]
    shape = (len(bits), rows, layout.groups)
    scales = (0.5 + torch.rand(shape, generator=generator)) * 3 / steps / columns**0.5
    zeros = (0.3 + 0.4 * torch.rand(shape, generator=generator)) * steps
    return PackedMatrices(layout, torch.cat(words).to(device), scales.half().to(device), zeros.half().to(device))


def random_layer(
    bits: Sequence[int],
    hidden: int,
    intermediate: int,
    group_size: int,
    offset: int = 0,
    *,
    kind: Kind = Kind(SILU),
    device: str = "cpu",
) -> PackedExperts:
    """Gate, up and down of every expert; ``offset``: where this rank's slice of down begins in a group."""
    rows = kind.activation.parts * intermediate
    gate_up = random_matrices(bits, rows, hidden, group_size, seed=1, device=device)
    down = random_matrices(bits, hidden, intermediate, group_size, offset, seed=2, device=device)
    return with_kind(PackedExperts(gate_up, down), kind)


def with_kind(packed: PackedExperts, kind: Kind) -> PackedExperts:
    """Return a layer that computes something else, with random biases if it has any."""
    generator = torch.Generator().manual_seed(9)
    for part in (packed.gate_up, packed.down) if kind.biased else ():
        shape = (len(packed.bits), part.matrices.rows)
        part.bias = torch.randn(shape, generator=generator).to(part.device)
    return PackedExperts(packed.gate_up, packed.down, kind.activation)


def mixed_matrices(
    experts: Sequence[Coding], rows: int, columns: int, group_size: int, offset: int = 0, *, seed: int = 0
) -> PackedMatrices:
    """Random matrices as :func:`random_matrices` makes them, each in a scheme of its own."""
    schemes, bits = zip(*experts, strict=True)
    layout = ragged(bits, rows, columns, group_size, offset, schemes)
    grid = random_matrices([b for s, b in experts if s is GRID] or [1], rows, columns, group_size, offset, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rings = [b for scheme, b in experts if scheme is TRELLIS_SCHEME]
    words = torch.randint(-(2**31), 2**31, (sum(rings) * rows * columns // 32,), generator=generator).int()
    scales = (0.5 + torch.rand((len(rings), rows), generator=generator)) / 18 / columns**0.5  # 18: the codes' deviation
    tensors = {**grid.tensors, TRELLIS: words, ROW_SCALE: scales.half()}
    return PackedMatrices(layout, *(tensors[suffix] for suffix in layout.suffixes))


def mixed_layer(
    experts: Sequence[Coding], hidden: int, intermediate: int, group_size: int = 128, offset: int = 0
) -> PackedExperts:
    """A layer whose experts have schemes of their own; ``offset`` as in :func:`random_layer`."""
    gate_up = mixed_matrices(experts, 2 * intermediate, hidden, group_size, seed=1)
    return PackedExperts(gate_up, mixed_matrices(experts, hidden, intermediate, group_size, offset, seed=2))


def dense(packed: PackedMatrices, expert: int) -> torch.Tensor:
    """Return an expert's weights in float32."""
    return packed.dense(expert, torch.float32)


FUNCTIONS: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "silu": lambda x, alpha: x / (1 + (-alpha * x).exp()),
    "gelu_tanh": lambda x, _: x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
    "relu2": lambda x, _: torch.where(x > 0, x * x, 0.0),
}
"""The formulas once more."""


def activated(first: torch.Tensor, does: Activation) -> torch.Tensor:
    """Return down's inputs by the formulas of transformers' models, in the dtype of ``first``."""
    function = FUNCTIONS[does.function]
    if not does.gated:
        return function(first, does.alpha)
    gate, up = first.chunk(2, dim=-1)
    limit = torch.tensor(does.limit, dtype=first.dtype, device=first.device)
    return function(torch.minimum(gate, limit), does.alpha) * (
        torch.maximum(torch.minimum(up, limit), -limit) + does.beta
    )


def exact(
    packed: PackedExperts,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    rotate: Callable[[torch.Tensor], torch.Tensor] = lambda inner: inner,
) -> torch.Tensor:
    """Return the layer's result in float64, without any rounding; ``rotate``: applied to down's inputs."""
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(len(packed.bits)):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        first = x[token].double() @ dense(packed.gate_up, expert).double().T
        if packed.gate_up.bias is not None:
            first = first + packed.gate_up.bias[expert].double()
        value = rotate(activated(first, packed.activation)) @ dense(packed.down, expert).double().T
        if packed.down.bias is not None:
            value = value + packed.down.bias[expert].double()
        result.index_add_(0, token, value * weights[token, slot, None].double())
    return result


def check_same_bits(kernel: LayerKernel, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
    """Check that neither the number of threads nor the other tokens of a batch change a token's result."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = kernel(x, weights, ids)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(kernel(x, weights, ids), together)
    finally:
        torch.set_num_threads(before)
    for token in range(len(x)):
        one = slice(token, token + 1)
        assert torch.equal(kernel(x[one], weights[one], ids[one]), together[one])


def random_routing(tokens: int, experts: int, top_k: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 weights and int32 ids [tokens, top-k], an expert at most once per token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((tokens, experts), generator=generator).topk(top_k).indices.int()
    return torch.rand((tokens, top_k), generator=generator) + 0.1, ids


EDGE_ROUTINGS = ("one expert", "padding rows", "nothing local", "half local")


def edge_routing(kind: str, weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a routing to at least four experts into one of :data:`EDGE_ROUTINGS`."""
    if kind == "one expert":
        return weights[:, :1], torch.full_like(ids[:, :1], 2)
    skipped = torch.zeros_like(ids, dtype=torch.bool)
    if kind == "padding rows":
        skipped[len(ids) // 2 :] = True
    elif kind == "nothing local":
        skipped[:] = True
    else:
        skipped = ids >= 2
    return weights, ids.masked_fill(skipped, -1)
