"""A layer on the humming package's kernels: one grouped GEMM per projection and width, the baseline for one launch.

A kernel of humming (PyPI: humming-kernels) handles one width. So the experts of each width form a class with its own
launches, which skip the other classes' pairs of token and expert. All classes write to the same buffers, each its own
rows, so SiLU and the weighted sum over the top-k run once for all classes.

humming takes the checkpoint's packing (one bit included) and w = (q − zero)·scale with any float zero. But it keeps
scales and zeros in the activations' dtype, and rounds after the subtraction and after the product. In bfloat16 the zero
of a 4-bit expert is off by up to 1/32 of a code, that of an 8-bit expert by up to half a code; float16 keeps them. Sums
are float32 within a tile. The partial sums of stream-K have the activations' dtype. The sum over the top-k is float32,
rounded once.

This module imports humming and vLLM only when a :class:`HummingLayer` is made or :func:`available` is called.
"""

from __future__ import annotations

import importlib
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vllm_moeq.format import UsageError
from vllm_moeq.kernels.interface import PackedExperts, PackedMatrices
from vllm_moeq.kernels.ragged import RaggedMatrices

MIN_GROUP, MAX_GROUP = 32, 128
"""The range of group sizes that humming gets; scales of larger groups are repeated."""

MISSING = "the humming kernel needs the package humming-kernels and a CUDA GPU of SM 7.5 or later"

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The pairs sorted by expert and padded to whole blocks; each block's expert; the number of pairs with padding."""


def available() -> bool:
    """Tell whether humming can be imported and supports this machine's GPU."""
    try:
        supported = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 5)
        return supported and bool(importlib.import_module("humming.forward"))
    except (ImportError, OSError):
        return False


def width_classes(bits: Sequence[int]) -> dict[int, list[int]]:
    """Return the local indices of each width's experts, both ascending."""
    return {width: [expert for expert, own in enumerate(bits) if own == width] for width in sorted(set(bits))}


def expert_map(members: Sequence[int], num_experts: int, device: torch.device) -> torch.Tensor:
    """Return each local expert's position in a class, int32 [num_experts + 1]; −1 for other experts and at the end."""
    table = torch.full((num_experts + 1,), -1, dtype=torch.int32)
    table[list(members)] = torch.arange(len(members), dtype=torch.int32)
    return table.to(device)


def common_group(matrices: RaggedMatrices) -> int:
    """Return the group size for humming, which takes powers of two and no offset; 0 means one group per row.

    Raises:
        UsageError: the groups' borders on this rank are not multiples of 32.
    """
    if matrices.groups == 1:
        return 0
    size = math.gcd(matrices.group_size, matrices.group_offset, matrices.columns)
    size = min(size & -size, MAX_GROUP)
    if size < MIN_GROUP:
        raise UsageError(
            f"humming needs groups of at least {MIN_GROUP} weights: {matrices.columns} columns that begin "
            f"{matrices.group_offset} into a group of {matrices.group_size} cannot be cut into such groups"
        )
    return size


def class_tensors(packed: PackedMatrices, experts: Sequence[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the experts of one width in humming's checkpoint layout.

    Returns:
        ``weight`` int32 [e, rows, columns·bits/32]; ``weight_scale`` and ``zero_point`` [e, rows, groups] in ``dtype``.

    Raises:
        UsageError: humming does not support the groups, or a scale or zero overflows ``dtype``.
    """
    matrices, device = packed.matrices, packed.words.device
    spans = [packed.words[matrices.offsets[e] : matrices.offsets[e + 1]].view(matrices.rows, -1) for e in experts]
    begins = torch.arange(0, matrices.columns, common_group(matrices) or matrices.columns, device=device)
    groups = (begins + matrices.group_offset) // matrices.group_size
    members = torch.tensor(experts, device=device)

    def convert(values: torch.Tensor, what: str) -> torch.Tensor:
        converted = values.index_select(0, members).index_select(2, groups).to(dtype)
        if not bool(converted.isfinite().all()):
            raise UsageError(f"humming keeps {what} in {dtype}, which these overflow; serve in bfloat16")
        return converted

    scales, zeros = convert(packed.scales, "scales"), convert(packed.zeros, "zeros")
    return {"weight": torch.stack(spans), "weight_scale": scales, "zero_point": zeros}


class IndexedGemm:
    """One projection of one class: outputs[pair] = W[expert of pair] · inputs[pair // top-k]."""

    def __init__(self, packed: PackedMatrices, experts: Sequence[int], dtype: torch.dtype) -> None:
        """Repack on the weights' device; the first call compiles. Raise UsageError as :func:`class_tensors` does."""
        matrices, device = packed.matrices, packed.words.device
        layout = {"weight_scale_group_size": common_group(matrices), "has_zero_point": True, "is_fp_zero_point": True}
        schema = importlib.import_module("humming.schema").HummingWeightSchema
        prepare = importlib.import_module("humming.transform").prepare_and_transform_humming_tensors
        self._config, tensors = prepare(
            tensors=class_tensors(packed, experts, dtype),
            shape_n=matrices.rows,
            shape_k=matrices.columns,
            weight_schema=schema(b_dtype=f"uint{matrices.bits[experts[0]]}", **layout),
            num_experts=len(experts),
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=dtype,
            device=device,
        )
        tune = importlib.import_module("humming.tune").get_heuristics_config
        tuning = tune(layer_config=self._config, gemm_type="indexed", device=device)
        self._limits = [int(limit) for _, limit, _ in tuning]
        self._variants = [config for _, _, config in tuning]
        # Stream-K counts arrivals in the locks. Each GEMM has its own, since the next launch may overlap its tail.
        locks = torch.zeros(8192, dtype=torch.int32, device=device)
        self._fixed = {**tensors, "locks": locks, "compute_config": COMPUTE, "tuning_config": json.dumps(tuning)}
        self._forward = importlib.import_module("humming.forward").humming_forward

    def block_size(self, rows: int) -> int:
        """Return the rows per block of the kernel that humming picks for this many rows."""
        return int(self._variants[bisect_left(self._limits, rows)]["block_shape"][0])

    def regimes(self) -> list[int]:
        """Return row counts that together select every kernel."""
        return list(dict(zip(map(json.dumps, self._variants), self._limits, strict=True)).values())

    def __call__(self, inputs: torch.Tensor, outputs: torch.Tensor, blocks: Blocks, top_k: int, rows: int) -> None:
        """Write the rows of ``outputs`` [pairs, n] whose pair is in ``blocks``, and no other rows.

        ``inputs`` is [pairs / top_k, columns]. ``rows`` is the number of pairs to tune for; it sets the block size.
        """
        self._forward(
            self._config,
            inputs=inputs,
            outputs=outputs,
            sorted_ids=blocks[0],
            expert_ids=blocks[1],
            num_tokens_padded=blocks[2],
            top_k=top_k,
            valid_shape_m=rows,
            **self._fixed,
        )


def align(ids: torch.Tensor, table: torch.Tensor, block_size: int) -> Blocks:
    """Sort pairs by expert and pad each expert's pairs to whole blocks, without waiting for the device.

    ``ids`` are local expert indices; ``table`` holds their positions in the class (:func:`expert_map`).
    """
    pairs, experts = ids.numel(), table.numel() - 1
    position = table[ids.flatten()].long()
    key, order = torch.where(position < 0, experts, position).sort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device).scatter_add_(0, key, torch.ones_like(key))
    padded = (counts + block_size - 1) // block_size * block_size
    ends = padded[:experts].cumsum(0)
    slot = (padded.cumsum(0) - padded)[key] + torch.arange(pairs, device=ids.device) - (counts.cumsum(0) - counts)[key]
    bound = min(pairs, (pairs + experts * (block_size - 1)) // block_size) * block_size
    sorted_ids = torch.full((bound + 1,), pairs, dtype=torch.int32, device=ids.device)
    # All skipped pairs go to the extra slot at the end.
    sorted_ids.scatter_(0, torch.where(key == experts, bound, slot), order.int())
    sorted_ids[bound:] = pairs
    starts = torch.arange(0, bound, block_size, device=ids.device)
    owners = torch.searchsorted(ends, starts, right=True).clamp(max=experts - 1)
    return sorted_ids[:bound], owners.int(), ends[-1:].int()


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate)·up, rounded once, for [pairs, 2·intermediate] with gate first."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def combine(down: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum over the top-k of [tokens, top-k, hidden]; rows with negative ids are ignored."""
    local = torch.where(topk_ids[..., None] < 0, 0.0, down.float())
    return (local * topk_weights[..., None]).sum(1).to(down.dtype)


class Steps(NamedTuple):
    """The steps before, between and after the GEMMs."""

    align: Callable[[torch.Tensor, torch.Tensor, int], Blocks] = align
    silu_mul: Callable[[torch.Tensor], torch.Tensor] = silu_mul
    combine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = combine


def fastest_steps(device: torch.device) -> Steps:
    """Return the kernels that vLLM uses around humming's, or plain torch if they are missing."""
    if device.type != "cuda":
        return Steps()
    try:
        blocks = importlib.import_module(f"{FUSED_MOE}.moe_align_block_size").moe_align_block_size
        mul_sum = importlib.import_module(f"{FUSED_MOE}.moe_fused_mul_sum").moe_fused_mul_sum
        silu_and_mul, _ = torch.ops._C.silu_and_mul, torch.ops._moe_C.moe_align_block_size
    except (ImportError, AttributeError, OSError):
        return Steps()

    def fast_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
        hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        silu_and_mul(hidden, gate_up)
        return hidden

    def fast_combine(down: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        result = down.new_zeros(down.shape[0], down.shape[2])  # rows without a valid id stay as they are
        mul_sum(down, topk_weights, outputs=result, topk_ids=topk_ids)
        return result

    return Steps(
        lambda ids, table, size: blocks(ids, size, table.numel(), table, ignore_invalid_experts=True),
        fast_silu_mul,
        fast_combine,
    )


class HummingLayer:
    """A layer whose width classes run one after the other in humming's kernels; it implements ``LayerKernel``."""

    name = "humming"

    def __init__(self, experts: PackedExperts, dtype: torch.dtype = torch.bfloat16) -> None:
        """Repack the layer on its device for activations of ``dtype``, float16 or bfloat16.

        Raises:
            UsageError: humming or a GPU is missing, or humming does not support these groups, scales or zeros.
        """
        if not available():
            raise UsageError(MISSING)
        device = experts.gate_up.words.device
        self._dtype, self._device, self._num_experts = dtype, device, len(experts.bits)
        self._hidden, self._intermediate = experts.hidden, experts.intermediate
        self._skip = torch.tensor(self._num_experts, dtype=torch.int32, device=device)
        self._steps = fastest_steps(device)
        self._classes = [
            (
                len(members),
                expert_map(members, self._num_experts, device),
                IndexedGemm(experts.gate_up, members, dtype),
                IndexedGemm(experts.down, members, dtype),
            )
            for members in width_classes(experts.bits).values()
        ]

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """See :class:`LayerKernel`; raise UsageError if x does not have the dtype given at construction."""
        if x.dtype != self._dtype:
            raise UsageError(f"this layer was repacked for {self._dtype}, not {x.dtype}")
        (tokens, top_k), pairs = topk_ids.shape, topk_ids.numel()
        if pairs == 0:
            return torch.zeros_like(x)
        ids = topk_ids.int().contiguous()
        # vLLM's alignment looks up every id in the map, so skipped ids need an entry too.
        safe = torch.where(ids < 0, self._skip, ids)
        x, gate_up, down = x.contiguous(), x.new_empty(pairs, 2 * self._intermediate), x.new_empty(pairs, self._hidden)
        found: list[tuple[int, Blocks]] = []
        for share, table, first, _ in self._classes:
            # Tune for the class's average number of pairs: only the device knows the true number.
            rows = -(-pairs * share // self._num_experts)
            found.append((rows, self._steps.align(safe, table, first.block_size(rows))))
            first(x, gate_up, found[-1][1], top_k, rows)
        hidden = self._steps.silu_mul(gate_up)
        for (rows, blocks), (_, table, first, second) in zip(found, self._classes, strict=True):
            size = second.block_size(rows)
            own = blocks if size == first.block_size(rows) else self._steps.align(safe, table, size)
            second(hidden, down, own, 1, rows)
        return self._steps.combine(down.view(tokens, top_k, -1), topk_weights.float().contiguous(), ids)

    def warm_up(self, dtype: torch.dtype, top_k: int) -> None:
        """Compile and load every kernel that humming's tuning can select; raise UsageError for another dtype.

        A call's argument ``rows`` selects the kernel, not the size of its input, so a few tokens suffice.
        """
        tokens = -(-self._num_experts // top_k)
        ids = (torch.arange(tokens * top_k, device=self._device) % self._num_experts).int().view(tokens, top_k)
        x = torch.zeros(tokens, self._hidden, dtype=dtype, device=self._device)
        self(x, torch.ones_like(ids, dtype=torch.float32), ids)
        hidden = x.new_zeros(ids.numel(), self._intermediate)
        gate_up, down = x.new_empty(ids.numel(), 2 * self._intermediate), x.new_empty(ids.numel(), self._hidden)
        for _, table, first, second in self._classes:
            for rows in first.regimes():
                first(x, gate_up, self._steps.align(ids, table, first.block_size(rows)), top_k, rows)
            for rows in second.regimes():
                second(hidden, down, self._steps.align(ids, table, second.block_size(rows)), 1, rows)
