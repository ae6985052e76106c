"""Parallel layouts that the kernels cannot have are refused by the flag's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

from planner.evaluation.vllm_server import Server, ServerError, cpu_environment
from tests.conftest import bound_to_cores
from vllm_moeq.format import UsageError
from vllm_moeq.serving.config import check_parallel

ALONE = FusedMoEParallelConfig(
    tp_size=1, pcp_size=1, dp_size=1, ep_size=1, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0, sp_size=1,
    use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False,
)  # fmt: skip
SHARED = {"dp_size": 2, "ep_size": 2, "use_ep": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tp_size": 4},
        SHARED,
        {**SHARED, "all2all_backend": "naive"},
        {"tp_size": 2, "use_ep": True, "all2all_backend": "deepep_low_latency"},  # without data parallelism unused
    ],
)
def test_possible_layouts_pass(changes: dict[str, Any]) -> None:
    check_parallel(replace(ALONE, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**SHARED, "all2all_backend": "deepep_high_throughput"},
            "--all2all-backend: expected allgather_reducescatter, found deepep_high_throughput",
        ),
    ],
)
def test_impossible_layouts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_parallel(replace(ALONE, **changes))


@pytest.mark.server
@pytest.mark.full
@pytest.mark.slow
def test_a_server_of_ranks_that_do_not_fit_ends(trellis_mixtral: Path, tmp_path: Path) -> None:
    """Blocks of 128 cannot be split in two; the ranks end before they read a weight."""
    flags = ["--max-model-len", "32", "--enforce-eager", "--skip-tokenizer-init", "--tensor-parallel-size", "2"]
    environment = {**cpu_environment(), **bound_to_cores(2)}
    with pytest.raises(ServerError, match="exited"), Server(trellis_mixtral, tmp_path / "log", flags, environment):
        pass
    assert (
        "experts: expected 1 as the number of ranks, so that each gets a multiple of 128 of the intermediate size 128, "
        "found 2; lower --tensor-parallel-size or add --enable-expert-parallel"
    ) in (tmp_path / "log").read_text()
