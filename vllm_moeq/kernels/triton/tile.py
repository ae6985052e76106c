"""What both kernels do with a tile: load the words of an expert, read its scales, add biases, store the results."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_moeq.kernels.triton.activate import function_of, gate_times_up

TILE = tl.constexpr(64)
"""The rows that lie together in memory."""


@triton.jit
def load_words(pointers, mask, WIDTH: tl.constexpr, PLANE: tl.constexpr):
    """Return ``WIDTH`` planes; what the mask leaves out is any number."""
    words = (tl.load(pointers, mask=mask),)
    for plane in tl.static_range(1, WIDTH):
        words = words + (tl.load(pointers + plane * PLANE, mask=mask),)  # type: ignore[assignment]  # noqa: RUF005
    return words


@triton.jit
def row_before(row, GATED: tl.constexpr):
    """Return the row whose bits come before each row's in the ring of its 16 rows; if GATED, see ``row_order``."""
    if GATED:
        place = row // 16 % 2 * 8 + row % 8
        before = (place + 15) % 16
        return row // 32 * 32 + before // 8 * 16 + row // 8 % 2 * 8 + before % 8
    else:
        return row // 16 * 16 + (row + 15) % 16


@triton.jit
def words_at(base, tile, row, blocks, WIDTH: tl.constexpr, LANES: tl.constexpr, GATED: tl.constexpr):
    """Return where the first block of some rows lies, and that of the rows before them: pointers [rows, LANES].

    Args:
        base: where the expert's words begin.
        tile: the rows' tile, one for all or [rows].
        row: the rows' places in their tile, [rows].
        blocks: blocks of the inputs.
    """
    lane = tl.arange(0, LANES)[None, :]
    at = tile * (blocks * WIDTH * TILE * LANES)
    return base + (at + row * LANES)[:, None] + lane, base + (at + row_before(row, GATED) * LANES)[:, None] + lane


@triton.jit
def scale_and_zero(pairs, MODE: tl.constexpr):
    """Return the scales and zeros of pairs, float32; see :class:`vllm_moeq.kernels.triton.repack.Repacked`."""
    if pairs.dtype == tl.int64:
        scale = (pairs & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        return scale, (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif MODE == "ptx":
        # One instruction for each: Triton's own way takes two for the upper half.
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=f,=f,r", (pairs,), dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        scale = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.constexpr_function
def _levels(count):
    return count.bit_length() - 1


@triton.constexpr_function
def _order(rank, levels):
    return (*range(rank - 1), *range(rank + levels - 1, rank - 1, -1), rank - 1)


@triton.jit
def beside(fields, COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """Return COUNT tensors side by side along their last dimension, as one of this shape.

    COUNT is a power of two. The tensors are registers of one matrix product's left side, and stay where they are.
    """
    LEVELS: tl.constexpr = _levels(COUNT)
    for level in tl.static_range(LEVELS):
        joined = ()
        for index in tl.static_range(COUNT >> (level + 1)):
            joined = joined + (tl.join(fields[2 * index], fields[2 * index + 1]),)  # type: ignore[assignment]  # noqa: RUF005
        fields = joined
    return fields[0].permute(_order(len(SHAPE), LEVELS)).reshape(SHAPE)


@triton.jit
def add_bias(total, biases, expert, tile, rows, wanted, ROWS: tl.constexpr):
    """Return the rows of one tile with an expert's biases, float32 [E, rows], if they are wanted and there are any."""
    if biases is not None:
        row = tile * ROWS + tl.arange(0, ROWS)
        bias = tl.load(biases + expert.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        total += tl.where(wanted, bias, 0.0)[:, None]
    return total


@triton.jit
def store_hidden(
    total, hidden, sums, pair, valid, tile, rows, sum_columns, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    GATED: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Store down's inputs [pairs, neurons], and if there are sums, those over chunks of 32 neurons.

    The rows of ``total`` are eight of gate and eight of up in turn, or if not GATED up's alone.
    """
    HALF: tl.constexpr = ROWS // 2 if GATED else ROWS
    neurons = rows // 2 if GATED else rows
    if GATED:
        halves = total.reshape(ROWS // 16, 2, 8, TOKENS).permute(0, 2, 3, 1)
        gate, up = tl.split(halves)
        result = gate_times_up(gate, up, FUNCTION, ALPHA, LIMIT, BETA).reshape(HALF, TOKENS)
    else:
        result = function_of(total, FUNCTION, ALPHA)
    value = result.to(hidden.dtype.element_ty)
    neuron = tile * HALF + tl.arange(0, HALF)
    target = hidden + pair.to(tl.int64)[None, :] * neurons + neuron[:, None]
    inside = valid[None, :] & (neuron < neurons)[:, None]
    tl.store(target, value, mask=inside)
    if sums is not None:
        exact = tl.where(inside, value.to(tl.float32), 0.0)
        chunk = tl.arange(0, HALF // 32)
        chunk_sums = tl.sum(exact.reshape(HALF // 32, 32, TOKENS), axis=1)
        at = tile * (HALF // 32) + chunk
        tl.store(
            sums + pair[None, :] * sum_columns + at[:, None],
            chunk_sums,
            mask=valid[None, :] & (at < neurons // 32)[:, None],
        )


@triton.jit
def store_weighted(total, out, weights, pair, valid, tile, rows, ROWS: tl.constexpr):
    """Store the result times the routing weight, [pairs, rows]."""
    weight = tl.load(weights + pair, mask=valid, other=0.0).to(tl.float32)
    row = tile * ROWS + tl.arange(0, ROWS)
    target = out + pair.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(target, (total * weight[None, :]).to(out.dtype.element_ty), mask=valid[None, :] & (row < rows)[:, None])


@triton.jit
def finish(total, biases, expert, out, out_sums, weights, pair, valid, tile, split, pairs, rows, sum_columns,
            ROWS: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, FUNCTION: tl.constexpr,
           ALPHA: tl.constexpr, LIMIT: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """Store the rows of a tile: hidden activations if there is a FUNCTION, else weighted outputs of one split."""
    total = add_bias(total, biases, expert, tile, rows, split == 0, ROWS)
    if FUNCTION >= 0:
        store_hidden(
            total, out, out_sums, pair, valid, tile, rows, sum_columns, ROWS, TOKENS, GATED, FUNCTION, ALPHA, LIMIT,
            BETA,
        )  # fmt: skip
    else:
        store_weighted(total, out + split.to(tl.int64) * pairs * rows, weights, pair, valid, tile, rows, ROWS)
