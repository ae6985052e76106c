"""What the kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.paths import ROOT
from tests.tiers import thorough

pytestmark = pytest.mark.compiler


def run(script: str, *flags: str) -> str:
    """Compile in another process: in this one the kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script] if not flags else [sys.executable, script, *flags]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


WIDTHS = "grid1,grid2,grid3,grid4,grid8"
RINGS = "trellis1,trellis2,trellis3,trellis4"
SETTINGS = [
    "--arch sm_90 --codings grid2",
    "--arch sm_90 --codings trellis2",
    pytest.param("--arch sm_90 --codings grid1,grid2,grid3 grid1,trellis2,trellis3,grid8", marks=pytest.mark.full),
    pytest.param("--arch sm_80 --codings grid2,grid3 trellis2,grid3", marks=pytest.mark.full),
    pytest.param("--arch sm_90 sm_120 --codings grid1,grid2,grid3 --group-size 32", marks=pytest.mark.full),
    *(
        pytest.param(f"--arch {arch} --codings {codings} --dtype {dtype} --group-size {group}", marks=pytest.mark.full)
        for arch in ("sm_80", "sm_90")
        for dtype, group in (("bf16", 128), ("fp16", 32))
        for codings in (WIDTHS, RINGS)
    ),
]


@pytest.fixture(scope="module", params=SETTINGS)
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Every variant, with several codings compiled in."""
    return json.loads(run("benchmarks/kernels/kernel_static.py", *request.param.split(), "--json"))  # type: ignore[no-any-return]


def test_no_spills(rows: list[dict[str, Any]]) -> None:
    assert len(rows) % 10 == 0
    for row in rows:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= 255


def test_every_coding_has_a_pipelined_loop_without_conversions(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["loops"] == len(row["codings"]), row
        assert row["i2f_in_loop"] == 0, row
        # A plane of words, the activations, their sums.
        assert row["async_copies_in_loop"] >= 3, row
        assert row["per_weight"]["convert"] == 0, row


def test_fits_the_shared_memory_of_small_gpus(rows: list[dict[str, Any]]) -> None:
    """99 KiB per program on sm_86 and sm_89."""
    for row in rows:
        assert row["shared_bytes"] <= 99 * 1024, row


@pytest.mark.parametrize("arch", thorough(["sm_80", "sm_90"], ["sm_90"]))
def test_rotations_do_not_spill(arch: str) -> None:
    script = f"""
from benchmarks.kernels.kernel_static import compile_arrange, usage_of
for size in (0, 16, 32, 64, 128, 256):
    print(*usage_of(compile_arrange(size, "bf16", {arch!r})))
"""
    found = [line.split() for line in run(script).splitlines()]
    assert [spilled for _, spilled in found] == ["0"] * 6


@pytest.mark.parametrize("arch", thorough(["sm_80", "sm_90"], ["sm_90"]))
def test_other_activations_do_not_spill(arch: str) -> None:
    """With bounds, a factor and biases, as in gpt-oss; and without a gate."""
    script = f"""
from dataclasses import replace
from benchmarks.kernels.kernel_static import compile_variant, usage_of, variants
from vllm_moeq.kernels.activations import Activation
most = Activation(alpha=1.702, limit=7.0, beta=1.0)
for activation in (most, Activation("relu2", gated=False)):
    for variant in list(variants(["grid2"]))[::4]:
        print(*usage_of(compile_variant(replace(variant, activation=activation, biased=True), {arch!r})))
"""
    found = [line.split() for line in run(script).splitlines()]
    assert [spilled for _, spilled in found] == ["0"] * 6


@pytest.mark.parametrize("arch", thorough(["sm_80", "sm_86", "sm_89", "sm_120", "gfx942", "gfx950"], ["gfx942"]))
def test_compiles_for_other_gpus(arch: str) -> None:
    script = f"""
from benchmarks.kernels.kernel_static import compile_variant, variants
for variant in list(variants(["grid3", "trellis2"], "fp16"))[::4]:
    kernel = compile_variant(variant, {arch!r})
    print(len(kernel.kernel))
"""
    sizes = [int(line) for line in run(script).split()]
    assert len(sizes) == 3
    assert min(sizes) > 1000
