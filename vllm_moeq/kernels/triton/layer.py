"""A layer repacked for the fused kernel, and the launches that run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from vllm_moeq.kernels.activations import Activation
from vllm_moeq.kernels.interface import PackedExperts
from vllm_moeq.kernels.triton.activate import constants_of
from vllm_moeq.kernels.triton.around import reduce_pairs, sort_pairs
from vllm_moeq.kernels.triton.codings import planes_in
from vllm_moeq.kernels.triton.few import few_tokens
from vllm_moeq.kernels.triton.inputs import CHUNK, Inputs, prepare
from vllm_moeq.kernels.triton.many import many_tokens
from vllm_moeq.kernels.triton.records import FIXED, Lookup
from vllm_moeq.kernels.triton.repack import Repacked, repack
from vllm_moeq.kernels.triton.schedule import (
    FEW_TOKENS,
    MANY,
    SHARED_BYTES,
    SHARED_BYTES_AMD,
    SPLIT_CHOICES,
    Block,
    Schedule,
    schedule_few,
    schedule_many,
    splits_for,
    weighted_splits,
)

PROGRAMS = 132 * 4
"""The programs that keep a GPU busy while it streams weights; if there are fewer, down's input dimension is split."""

SORT_CHUNK = 1024
REDUCE_BLOCK = 1024


def interpreted() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on any device."""
    return isinstance(few_tokens, InterpretedFunction)


def arithmetic(dtype: torch.dtype) -> str:
    """Return the ``MODE`` of :func:`vllm_moeq.kernels.triton.fields.code_of` for this machine."""
    if interpreted():
        return "float32" if dtype == torch.bfloat16 else "plain"
    return "plain" if torch.version.hip else "ptx"


def block_of(*projections: Repacked) -> Block:
    """Return the largest block that a program of any projection loads."""
    return Block(
        max(planes_in(it.codings) for it in projections),
        max(it.groups * it.scales.element_size() for it in projections),
    )


@dataclass
class Tokens:
    """The routing of one call; a pair is a token and one of its experts.

    Attributes:
        ids: local expert indices, int32 [pairs].
        weights: routing weights, float32 [pairs].
        top_k: pairs per token.
        order: the pairs sorted by expert; None for few tokens.
        counts: pairs per expert; None for few tokens.
        records: what :func:`vllm_moeq.kernels.triton.records.look_up` finds; None for many tokens.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    top_k: int
    order: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    records: torch.Tensor | None = None

    @property
    def pairs(self) -> int:
        """The number of pairs, tokens times top-k."""
        return self.ids.numel()


class TritonLayer:
    """All experts of a layer in one launch for gate and up, and one for down.

    Args:
        packed: the layer as loaded; it is not kept.
    """

    name = "triton"

    def __init__(self, packed: PackedExperts) -> None:
        self.activation = packed.activation
        self.gate_up = repack(packed.gate_up, gated=packed.activation.gated)
        self.down = repack(packed.down, gated=False)
        self.bits = list(packed.bits)
        self.hidden = packed.hidden
        self.intermediate = packed.intermediate
        self.before_up = prepare(self.gate_up, packed.gate_up.rotation)
        self.before_down = prepare(self.down, packed.down.rotation)
        device = packed.device
        self.block = block_of(self.gate_up, self.down)
        self.shared = SHARED_BYTES_AMD if torch.version.hip else SHARED_BYTES
        self.experts = triton.next_power_of_2(max(len(self.bits), 2))
        self.splits = {
            most: torch.tensor(weighted_splits(self.bits, most), dtype=torch.int32, device=device)
            for most in SPLIT_CHOICES
        }

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden] in x's dtype; see :class:`vllm_moeq.kernels.interface.LayerKernel`."""
        x = x.contiguous()
        out = torch.empty_like(x)
        if not x.shape[0]:
            return out
        ids, weights = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
        tokens = Tokens(ids.flatten(), weights.flatten(), topk_ids.shape[1])
        few = x.shape[0] <= FEW_TOKENS
        lookup = None
        if few:
            schedule, splits = self.schedule_few(x.shape[0]), self._splits(tokens.pairs)
            lookup = self.with_records(tokens, schedule, splits)
        else:
            schedule, splits = schedule_many(tokens.pairs, len(self.bits)), 1
            tokens.order, tokens.counts = self._sort(tokens)
        inner = self._gate_up(self.before_up(x, few, lookup=lookup), tokens, schedule)
        dtype = torch.float32 if few else x.dtype
        parts = x.new_empty((splits, tokens.pairs, self.hidden), dtype=dtype)
        self.project(self.down, inner, tokens, schedule, parts, splits=splits)
        grid = (x.shape[0], triton.cdiv(self.hidden, REDUCE_BLOCK))
        reduce_pairs[grid](
            parts, tokens.ids, self.splits[splits], out, tokens.pairs, self.hidden, tokens.top_k, splits, REDUCE_BLOCK
        )
        return out

    def _splits(self, pairs: int) -> int:
        programs = min(pairs, len(self.bits)) * triton.cdiv(self.hidden, 64)
        return splits_for(programs, self.down.blocks, PROGRAMS)

    def schedule_few(self, tokens: int) -> Schedule:
        """Return the variant for up to FEW_TOKENS tokens."""
        return schedule_few(tokens, self.block, self.shared)

    def with_records(self, tokens: Tokens, schedule: Schedule, splits: int) -> Lookup:
        """Give few tokens a tensor for their records, and return what fills it."""
        tokens.records = tokens.ids.new_empty((tokens.pairs, FIXED.value + schedule.tokens))
        tables = self.gate_up.table, self.down.table
        return Lookup(tokens.ids, *tables, self.splits[splits], tokens.records, tokens.top_k, schedule.tokens)

    def _sort(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        order, counts = torch.empty_like(tokens.ids), tokens.ids.new_empty(self.experts)
        sort_pairs[(self.experts,)](tokens.ids, order, counts, tokens.pairs, SORT_CHUNK)
        return order, counts

    def _gate_up(self, inputs: Inputs, tokens: Tokens, schedule: Schedule) -> Inputs:
        """Return the activation's results for every pair, as down's launch needs them."""
        hidden = inputs.x.new_empty((tokens.pairs, self.intermediate))
        if self.before_down.changes:
            self.project(self.gate_up, inputs, tokens, schedule, hidden, activation=self.activation)
            return self.before_down(hidden, tokens.order is None, local=tokens.ids)
        columns = self.down.blocks * self.down.block // CHUNK
        padded = columns * CHUNK != self.intermediate
        make = torch.zeros if padded else torch.empty
        chunks = make((tokens.pairs, columns), dtype=torch.float32, device=hidden.device)
        self.project(self.gate_up, inputs, tokens, schedule, hidden, activation=self.activation, out_sums=chunks)
        if tokens.order is not None and self.down.group_size > CHUNK:
            chunks = chunks.view(tokens.pairs, -1, self.down.group_size // CHUNK).sum(-1)
        return Inputs(hidden[None], chunks)

    def project(
        self,
        matrices: Repacked,
        inputs: Inputs,
        tokens: Tokens,
        schedule: Schedule,
        out: torch.Tensor,
        *,
        activation: Activation | None = None,
        out_sums: torch.Tensor | None = None,
        splits: int = 1,
    ) -> None:
        """Launch one projection.

        Args:
            matrices: the projection's matrices.
            inputs: the inputs of tokens or pairs.
            tokens: the routing.
            schedule: the variant to launch.
            out: the output, written; see :func:`vllm_moeq.kernels.triton.few.few_tokens`.
            activation: what follows gate and up; None for down.
            out_sums: the sums of ``out`` over CHUNK columns, written if gate and up's are wanted.
            splits: the parts of the input dimension of the widest expert.
        """
        per_block = inputs.sums.shape[1] // matrices.blocks
        common: dict[str, Any] = {
            "SHARE": tokens.pairs // inputs.rows, "ROWS": schedule.rows, "TOKENS": schedule.tokens,
            "CODINGS": matrices.codings, "LANES": matrices.lanes, "GROUPS": matrices.groups,
            "SUM": matrices.block // per_block, "EVEN": inputs.columns % matrices.block == 0,
            **constants_of(activation), "STAGES": schedule.stages, "MODE": arithmetic(inputs.x.dtype),
            "num_warps": schedule.warps,
        }  # fmt: skip
        if schedule.registers and common["MODE"] == "ptx":
            common["maxnreg"] = schedule.registers
        sizes = (matrices.rows, inputs.columns, 0 if out_sums is None else out_sums.shape[1])
        tiles = triton.cdiv(matrices.rows, schedule.rows)
        if tokens.order is None or tokens.counts is None:
            few_tokens[(tiles, tokens.pairs, splits)](
                inputs.x, inputs.sums, tokens.records, tokens.weights, matrices.words, matrices.scales, matrices.bias,
                out, out_sums, tokens.pairs, *sizes, SIDE=int(activation is None), SLICES=schedule.slices,
                FULL=splits == 1 and matrices.blocks % schedule.slices == 0, **common,
            )  # fmt: skip
            return
        blocks = min(tokens.pairs, triton.cdiv(tokens.pairs, schedule.tokens) + len(self.bits))
        many_tokens[(tiles * blocks,)](
            inputs.x, inputs.sums, tokens.order, tokens.counts, tokens.weights, matrices.words, matrices.scales,
            matrices.table, matrices.bias, out, out_sums, tokens.pairs, blocks, *sizes, EXPERTS=self.experts,
            TOGETHER=8, **common,
        )  # fmt: skip

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Compile every variant for one activation dtype, each by the smallest call that needs it."""
        device = self.gate_up.words.device
        for tokens in self.warm_up_sizes(top_k):
            ids = torch.arange(tokens * top_k, device=device, dtype=torch.int32).view(tokens, top_k) % len(self.bits)
            weights = torch.ones((tokens, top_k), device=device)
            self(torch.zeros((tokens, self.hidden), dtype=dtype, device=device), weights, ids)

    def warm_up_sizes(self, top_k: int) -> list[int]:
        """Return numbers of tokens that together use every schedule and every number of splits."""
        few = {(self.schedule_few(tokens), self._splits(tokens * top_k)): tokens for tokens in range(FEW_TOKENS, 0, -1)}
        many = {max(FEW_TOKENS + 1, schedule.tokens * len(self.bits) // top_k) for schedule in MANY}
        return sorted({*few.values(), *many})
