"""Where the intermediate dimension of a layer's experts can be cut for tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterable

from vllm_moeq.format.errors import UsageError
from vllm_moeq.format.rotation import Rotated
from vllm_moeq.format.schema import MoeqConfig
from vllm_moeq.format.schemes import Scheme
from vllm_moeq.format.tensors import Tensors
from vllm_moeq.format.validation import expert_matrices


def check_ranks(prefix: str, whole: int, schemes: Iterable[Scheme], rotated: Rotated | None, ranks: int) -> None:
    """Refuse slices that the schemes or the rotation cannot have: tiles, words and blocks stay whole.

    Args:
        prefix: the layer's experts.
        whole: the intermediate size of all ranks together.
        schemes: the schemes of its experts.
        rotated: the rotation of the inputs of down, if there is one.
        ranks: the number of slices.

    Raises:
        UsageError: naming the layer, and what fits.
    """
    steps = [number for scheme in schemes for number in (scheme.row_step, scheme.column_step)]
    step = math.lcm(*steps, 1 if rotated is None else rotated.size)
    if whole % (step * ranks) == 0:
        return
    # Attention has been split by all ranks already, so that it can be split by a divisor of their number.
    fitting = [str(it) for it in range(1, ranks) if ranks % it == 0 and whole % (step * it) == 0]
    if not fitting:
        raise UsageError(f"{prefix}: expected an intermediate size in multiples of {step}, found {whole}")
    raise UsageError(
        f"{prefix}: expected {' or '.join(fitting)} as the number of ranks, so that each gets a multiple of "
        f"{step} of the intermediate size {whole}, found {ranks}; lower --tensor-parallel-size or add "
        "--enable-expert-parallel"
    )


def check_slices(shards: Tensors, config: MoeqConfig, ranks: int) -> None:
    """Refuse a number of ranks that the experts of a checkpoint cannot be cut for; reads headers alone.

    Raises:
        CheckpointError: damaged headers.
        UsageError: see :func:`check_ranks`.
    """
    for matrix in expert_matrices(shards, config):
        if matrix.projection == config.projections.down:
            check_ranks(matrix.prefix, matrix.columns, [matrix.scheme], matrix.rotated, ranks)
