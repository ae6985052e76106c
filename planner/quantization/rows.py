"""Quantize a matrix in parts of some rows, on several threads.

Quantizers without calibration treat output neurons independently, so the result equals that of the whole matrix. A part
and its float32 temporaries stay in the cache, and memory stays small. One thread computes each part, so the number of
threads does not change the result, and threads do not wait for each other inside an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from planner.model.source import SourceModel
from planner.quantization.packed import PackedMatrix, join_rows, pack_matrix
from planner.quantization.quantizers import Quantizer, quantize_linear
from planner.quantization.quantizers.base import check_weights
from planner.quantization.quantizers.hqq import BLOCK_WEIGHTS
from planner.quantization.quantizers.rotated import Basis, rounded_in
from vllm_moeq.format import CheckpointError, Linear
from vllm_moeq.format.linears import SHAPE

T = TypeVar("T")

BLOCKS = 4
"""Number of hqq's blocks in one part. malloc reuses the resulting float32 temporaries of 2 MiB; it would map those of
4 MiB anew each time (:mod:`planner.common.memory`)."""


WORKING_BYTES_PER_WEIGHT = 24
"""Bytes per weight of a quantizer's float32 copies and temporaries while it works on one matrix."""

TILES = 8
"""Least number of a scheme's tiles, one above the other, in one part: the search for the codes of a trellis takes half
as long with eight as with one."""


def part_rows(columns: int, multiple: int = 1) -> int:
    """Return the rows of a part of a matrix on a CPU, a multiple of ``multiple``."""
    step = BLOCKS * max(1, BLOCK_WEIGHTS // columns)
    return max(-(-step // multiple), TILES if multiple > 1 else 1) * multiple


def part_bytes(columns: int, multiple: int = 1) -> int:
    """Return the bytes of the temporaries of one part, which a thread quantizes at a time."""
    return max(part_rows(columns, multiple) * columns, BLOCKS * BLOCK_WEIGHTS) * WORKING_BYTES_PER_WEIGHT


class Threads:
    """A thread pool and the device that its threads compute on. Each thread uses one torch thread."""

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self.pool = pool
        self.device = device

    def parts(self, function: Callable[[torch.Tensor], T], model: SourceModel, name: str, multiple: int = 1) -> list[T]:
        """Apply ``function`` to consecutive parts of a matrix's rows, on a GPU to all rows at once; return the results.

        Parts begin at multiples of ``multiple``.

        Raises:
            CheckpointError: the matrix cannot be read, or ``function`` raised one; the message names file and tensor.
        """
        rows, columns = model.shards.info(name).shape
        step = part_rows(columns, multiple) if self.device.type == "cpu" else rows

        def part(begin: int) -> T:
            weight = model.shards.read_rows(name, begin, min(begin + step, rows)).to(self.device)
            try:
                check_weights(weight)
                return function(weight)
            except CheckpointError as error:
                path = model.folder / model.shards.info(name).shard
                raise CheckpointError(f"{path}: tensor {name}: {error}") from None

        return list(self.pool.map(part, range(0, rows, step)))


@contextmanager
def open_threads(count: int, device: torch.device | None = None) -> Iterator[Threads]:
    """Yield a pool of ``count`` threads. While it is open, torch uses one thread in the caller too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield Threads(pool, device or torch.device("cpu"))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def quantize_rows(
    threads: Threads,
    model: SourceModel,
    name: str,
    quantizer: Quantizer,
    bits: int,
    group_size: int,
    basis: Basis | None = None,
    step: int = 1,
) -> PackedMatrix:
    """Quantize and pack a matrix [N, K] of a model.

    Args:
        threads: the threads to use.
        model: the model.
        name: the matrix's name.
        quantizer: a quantizer that needs only the weights.
        bits: width of the codes.
        group_size: weights per scale, or −1 for whole rows.
        basis: the rotation in whose basis it is quantized; None quantizes it as it is.
        step: rows that belong together.

    Raises:
        CheckpointError: see :func:`planner.quantization.quantizers.base.to_groups`.
    """

    def part(rows: torch.Tensor) -> PackedMatrix:
        return pack_matrix(rows, rounded_in(basis, quantizer, rows, bits, group_size))

    parts = threads.parts(part, model, name, step)
    if len({found.dtypes for found in parts}) > 1:
        # Some rows may need bfloat16 scales, for example, but a tensor has one dtype.
        return part(model.shards.load(name))
    return join_rows(parts)


def quantize_linear_rows(threads: Threads, model: SourceModel, name: str, spec: Linear) -> dict[str, torch.Tensor]:
    """Quantize a matrix of a model by :func:`planner.quantization.quantizers.quantize_linear`; return its tensors."""
    parts = threads.parts(lambda rows: quantize_linear(rows, spec), model, name)
    joined = {suffix: torch.cat([found[suffix].cpu() for found in parts]) for suffix in parts[0]}
    return {**joined, SHAPE: torch.tensor(model.shards.info(name).shape, dtype=torch.int64)}
