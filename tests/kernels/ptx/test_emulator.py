"""The emulator itself, on kernels like those of Triton's tutorials, whole and broken on purpose."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.ptx.broken import BREAKAGES, Breakage
from tests.kernels.ptx.emulator.findings import Kind
from tests.kernels.ptx.emulator.instructions import Float, Integer, Register, UnsupportedError
from tests.kernels.ptx.emulator.parser import parse
from tests.kernels.ptx.process import Call

pytestmark = pytest.mark.compiler

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")

HEAD = """
.version 8.4
.target sm_80
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
.reqntid 64
{
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["vectors", "rows", "branches", "twice"])
def test_simple_kernels(emulated: Call, name: str, arch: str) -> None:
    outcome = emulated(f"tutorial.{name}", arch)
    assert outcome.error < 1e-7
    assert not outcome.lines


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warps", [4, 8])
def test_products_of_matrices(emulated: Call, arch: str, dtype: torch.dtype, warps: int) -> None:
    outcome = emulated("tutorial.matrices", arch, dtype, warps)
    assert outcome.error < 1e-6
    assert not outcome.lines
    assert "cp.async.cg" in outcome.text
    assert ("wgmma.mma_async" in outcome.text) == (arch == "sm_90")
    assert ("mma.sync" in outcome.text) == (arch != "sm_90")


@pytest.mark.parametrize("breakage", BREAKAGES, ids=str)
def test_broken_kernels_are_caught(emulated: Call, breakage: Breakage) -> None:
    outcome = emulated("broken.run", breakage)
    assert outcome.changed
    assert breakage.kind in outcome.kinds, outcome.lines


def test_every_finding_has_a_broken_kernel() -> None:
    assert {breakage.kind for breakage in BREAKAGES} == set(Kind)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("@%p1 bra $A; bar.sync 0; $A: bra $A;", "does not end"),
        ("add.cc.u32 %r1, %r1, %r1; ret;", r"add\.cc\.u32"),
        ("@%p1 bar.sync 0; ret;", r"bar\.sync"),
        ("call foo; ret;", "call"),
    ],
)
def test_what_cannot_be_run_is_refused(emulated: Call, code: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        emulated("broken.run", Breakage("", "vectors", "sm_80", Kind.BARRIERS, r"\bret;", code))


def test_the_parser_reads_operands_and_scopes() -> None:
    kernel = parse(HEAD + "@!%p1 add.s32 %r1, 0x10, -3;\n{ .reg .b32 t; mov.f32 t, 0f3F800000; }\nret; }")
    add, move = kernel.blocks[0].instructions[:2]
    assert (add.op, add.args, add.guard) == ("add.s32", (Register("%r1"), Integer(16), Integer(-3)), ("%p1", True))
    assert move.args == (Register("t#5"), Float(0x3F800000, 4))
    assert (kernel.parameters, kernel.threads) == (["k_param_0"], 64)


@pytest.mark.parametrize("line", [".local .b8 x[4];", "add.s32 %r1, {%r2;", "ld.global.b32 %r1, [%r2+%r1];"])
def test_the_parser_refuses_what_it_does_not_know(line: str) -> None:
    with pytest.raises(UnsupportedError):
        parse(HEAD + line + "\nret; }")
