"""Layers and routings that go through the emulator, and what they must give."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

import vllm_moeq.kernels.triton.layer as module
from tests.kernels.layers import (
    EDGE_ROUTINGS,
    KINDS,
    Coding,
    activated,
    dense,
    edge_routing,
    exact,
    mixed_layer,
    random_layer,
    random_routing,
)
from tests.kernels.ptx.emulator.device import Change, emulate
from tests.kernels.ptx.emulator.findings import Kind
from tests.kernels.ptx.emulator.outcome import Outcome
from tests.kernels.rotations import Rotations, random_rotation, rotated, turned
from vllm_moeq.format import GRID, TRELLIS_SCHEME
from vllm_moeq.kernels import PackedExperts, PackedMatrices
from vllm_moeq.kernels.triton.schedule import FEW_TOKENS, Schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3}
"""The limit of ‖error‖ / ‖exact‖ against float64."""

STEP = {"bf16": 2.0**-7, "fp16": 2.0**-10}
"""The limit of any difference to the reference that rounds where the kernel does: a step at the largest value."""

HARMLESS = {Kind.UNWRITTEN}
"""Unused slots of a tile read the first pair's hidden activations, which nothing wrote if its expert is not local. They
are no numbers in the emulator, so an effect on the result would show."""

FIRST_AND_LAST = "first and last"
"""The first expert has one token, the last expert all others."""

ROUTINGS = ("mixed", FIRST_AND_LAST, *EDGE_ROUTINGS)


@dataclass(frozen=True)
class Case:
    """One layer and one call.

    Attributes:
        arch: the architecture.
        dtype: a key of :data:`DTYPES`.
        bits: the width of each expert.
        shape: hidden and intermediate size, group size, and this rank's offset within a group.
        tokens: the number of tokens.
        top_k: experts per token.
        routing: one of :data:`ROUTINGS`.
        wide_scales: whether scales are float32.
        splits: the parts of down's input dimension; None leaves the choice to the layer.
        schedule: the variant to run; None leaves the choice to the layer.
        rings: the experts whose weights are trellises, by index; the others are grids.
        rotations: sizes of the rotations of the layer's input and of the hidden activations; 0 is none.
        kind: what experts compute besides products, a key of :data:`tests.kernels.layers.KINDS`; "" is silu(gate)·up.
    """

    arch: str
    dtype: str = "bf16"
    bits: tuple[int, ...] = (3, 3, 3, 3)
    shape: tuple[int, int, int, int] = (320, 160, 32, 0)
    tokens: int = 1
    top_k: int = 2
    routing: str = "mixed"
    wide_scales: bool = False
    splits: int | None = None
    schedule: Schedule | None = None
    rings: tuple[int, ...] = ()
    rotations: tuple[int, int] = (0, 0)
    kind: str = ""

    def __str__(self) -> str:
        tile = f" {self.schedule.rows}x{self.schedule.tokens}" if self.schedule else ""
        kind = f" {self.kind}" if self.kind else ""
        return f"{self.arch} {self.dtype} {self.widths} {self.tokens}{tile} {self.routing}{kind}"

    @property
    def experts(self) -> list[Coding]:
        """Scheme and width of each expert."""
        return [(TRELLIS_SCHEME if index in self.rings else GRID, bits) for index, bits in enumerate(self.bits)]

    @property
    def widths(self) -> str:
        """The widths, with a t behind those of trellises, and an r behind them all if the layer is rotated."""
        found = sorted({f"{bits}{'t' * (scheme is TRELLIS_SCHEME)}" for scheme, bits in self.experts})
        return ",".join(found) + " r" * any(self.rotations)

    @property
    def turns(self) -> Rotations:
        """The rotations."""
        columns = self.shape[:2]
        return Rotations(
            *(random_rotation(n, size) if size else None for n, size in zip(columns, self.rotations, strict=True))
        )


@dataclass(frozen=True)
class Edit:
    """A change of the two large kernels' PTX, by a regular expression."""

    pattern: str
    replacement: str

    def __call__(self, name: str, text: str) -> str:
        """Return a kernel's text, changed."""
        return re.sub(self.pattern, self.replacement, text) if name.endswith("_tokens") else text


@dataclass(frozen=True)
class Figures:
    """How far a layer's result is from exact ones.

    Attributes:
        error: ‖error‖ / ‖exact‖ against float64.
        rounding: the part of it that rounding alone makes.
        step: the largest difference to the reference that rounds where the kernel does, over the largest value.
        outcome: what the sanitizer saw.
        problems: what is wrong, in words.
    """

    error: float
    rounding: float
    step: float
    outcome: Outcome
    problems: list[str]


def routed(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return routing weights and ids."""
    weights, ids = random_routing(case.tokens, len(case.bits), case.top_k)
    if case.routing in EDGE_ROUTINGS:
        return edge_routing(case.routing, weights, ids)
    if case.routing == FIRST_AND_LAST:
        ids[:, 0], ids[:, 1:], ids[0, 0] = len(case.bits) - 1, -1, 0
    return weights, ids


def packed_of(case: Case) -> PackedExperts:
    """Return the layer."""
    if case.kind:
        return random_layer(case.bits, *case.shape, kind=KINDS[case.kind])
    packed = mixed_layer(case.experts, *case.shape) if case.rings else random_layer(case.bits, *case.shape)
    if not case.wide_scales:
        return packed
    parts = (packed.gate_up, packed.down)
    gate_up, down = (PackedMatrices(m.matrices, m.words, m.scales.float(), m.zeros.float()) for m in parts)
    return PackedExperts(gate_up, down)


def bias_of(packed: PackedMatrices, expert: int) -> torch.Tensor:
    """Return what is added to an expert's outputs, float64."""
    return torch.zeros(1, dtype=torch.float64) if packed.bias is None else packed.bias[expert].double()


def rounded(
    packed: PackedExperts, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, turns: Rotations
) -> torch.Tensor:
    """Return the exact result, but with all activations that are stored rounded to x's dtype, and the output too.

    For many tokens each expert's output is rounded as well.
    """
    result = torch.zeros(x.shape, dtype=torch.float64)
    before = rotated(x, turns.before_up).to(x.dtype)
    for expert in range(len(packed.bits)):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        first = before[token].double() @ dense(packed.gate_up, expert).double().T
        hidden = activated(first + bias_of(packed.gate_up, expert), packed.activation).to(x.dtype)
        value = (
            rotated(hidden, turns.before_down).to(x.dtype).double() @ dense(packed.down, expert).double().T
            + bias_of(packed.down, expert)
        ) * weights[token, slot, None].double()
        result.index_add_(0, token, value.to(x.dtype).double() if len(x) > FEW_TOKENS else value)
    return result.to(x.dtype).double()


def run(case: Case, change: Change | None = None) -> Figures:
    """Run a layer as the project does, with the GPU emulated."""
    packed, turns, (weights, ids) = packed_of(case), case.turns, routed(case)
    x = torch.randn((case.tokens, packed.hidden), generator=torch.Generator().manual_seed(3)).to(DTYPES[case.dtype])
    with pytest.MonkeyPatch.context() as patch:
        if case.splits is not None:
            patch.setattr(module.TritonLayer, "_splits", lambda *_: case.splits)
        if case.schedule is not None:
            patch.setattr(module, "schedule_few", lambda *_: case.schedule)
            patch.setattr(module, "schedule_many", lambda *_: case.schedule)
        layer = module.TritonLayer(turned(packed, turns))
        with emulate(case.arch, change) as session:
            found = layer(x, weights, ids)
    before = rotated(x, turns.before_up)
    expected = exact(packed, before, weights, ids, lambda inner: rotated(inner, turns.before_down))
    close = rounded(packed, x, weights, ids, turns)
    norm, top = max(float(expected.norm()), 1e-300), max(float(expected.abs().max()), 1e-300)
    error, rounding = (float((value - expected).norm()) / norm for value in (found.double(), close))
    step = float((found.double() - close).abs().max()) / top
    outcome = session.outcome(error)
    wrong = [line for line in outcome.lines if not line.startswith(tuple(HARMLESS))]
    if not found.isfinite().all() or error >= TOLERANCE[case.dtype] or step >= STEP[case.dtype]:
        wrong.append(f"‖error‖ / ‖exact‖ {error:.1e}, largest difference {step:.1e} of the largest value")
    if found[(ids < 0).all(1)].any():
        wrong.append("a token without local experts got a result")
    return Figures(error, rounding, step, outcome, wrong)
