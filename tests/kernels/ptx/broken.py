"""PTX of the tutorial's kernels, broken on purpose: one way for each kind of finding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.kernels.ptx import tutorial
from tests.kernels.ptx.emulator.device import Change
from tests.kernels.ptx.emulator.findings import Kind
from tests.kernels.ptx.emulator.outcome import Outcome

RUNS: dict[str, Callable[[str, Change], Outcome]] = {
    "vectors": tutorial.vectors,
    "rows": tutorial.rows,
    "matrices": lambda arch, change: tutorial.matrices(arch, torch.bfloat16, 4, change),
}


@dataclass(frozen=True)
class Breakage:
    """One change of PTX.

    Attributes:
        name: the change in words.
        kernel: a key of :data:`RUNS`.
        arch: the architecture.
        kind: the finding that must come of it.
        pattern: what is replaced, a regular expression.
        replacement: what it is replaced by, as in :func:`re.sub`.
        count: how many times at most; 0 means all.
    """

    name: str
    kernel: str
    arch: str
    kind: Kind
    pattern: str
    replacement: str = ""
    count: int = 0

    def __call__(self, _: str, text: str) -> str:
        """Return the kernel's text, changed."""
        return re.sub(self.pattern, self.replacement, text, count=self.count)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


ACCUMULATOR = r"(wgmma\.mma_async[^{]*\{(%r\d+),[^;]*;)"

BREAKAGES = (
    Breakage("a pointer to nothing", "vectors", "sm_80", Kind.WILD,
             r"ld\.param\.b64(.*)\[add_param_0\]", r"mov.b64\1 0"),
    Breakage("no guard of loads", "vectors", "sm_80", Kind.OUT_OF_BOUNDS, r"@%p\d+ (ld\.global)", r"\1"),
    Breakage("a pointer two bytes on", "vectors", "sm_80", Kind.MISALIGNED, r"(ld\.global.*\+) 0", r"\1 2", 1),
    Breakage("the output as an input", "vectors", "sm_80", Kind.UNWRITTEN, r"\[add_param_0\]", "[add_param_2]"),
    Breakage("a load behind shared memory", "matrices", "sm_90", Kind.SHARED_OUT_OF_BOUNDS,
             r"(ld\.shared.*)\+512", r"\1+65536"),
    Breakage("a load four bytes on", "matrices", "sm_90", Kind.SHARED_MISALIGNED, r"(ld\.shared.*)\+512", r"\1+516"),
    Breakage("no stores", "rows", "sm_80", Kind.NEVER_WRITTEN, r"st\.shared[^;]*;"),
    Breakage("no waits", "matrices", "sm_80", Kind.NOT_WAITED_FOR, r"cp\.async\.wait_group\s+\d+;"),
    Breakage("waits two groups late", "matrices", "sm_80", Kind.NOT_WAITED_FOR,
             r"(cp\.async\.wait_group\s+)2;", r"\g<1>4;"),
    Breakage("every copy twice", "matrices", "sm_80", Kind.COPY_IN_FLIGHT, r"(cp\.async\.cg[^;]*;)", r"\1 \1"),
    Breakage("no barriers behind waits", "matrices", "sm_80", Kind.READ_AFTER_WRITE,
             r"(cp\.async\.wait_group[^;]*;(?:\s|\.loc[^\n]*|//[^\n]*)*)bar\.sync\s+0;", r"\1"),
    Breakage("no barriers", "matrices", "sm_80", Kind.WRITE_AFTER_READ, r"bar\.sync\s+0;"),
    Breakage("no barriers", "matrices", "sm_80", Kind.WRITE_AFTER_WRITE, r"bar\.sync\s+0;"),
    Breakage("all stores to one address", "rows", "sm_80", Kind.ONE_ADDRESS,
             r"(st\.shared\.b32\s+)\[%r\d+\]", r"\1[global_smem]"),
    Breakage("two barriers for the threads of a block", "vectors", "sm_80", Kind.BARRIERS, r"\bret;",
             "@%p1 bra $A; bar.sync 0; bra.uni $B;\n$A: bar.sync 0;\n$B: ret;"),
    Breakage("no fence", "matrices", "sm_90", Kind.NOT_FENCED, r"fence\.proxy\.async[^;]*;"),
    Breakage("an accumulator written behind the fence", "matrices", "sm_90", Kind.WGMMA_OPERAND,
             ACCUMULATOR, r"mov.b32 \2, \2; \1"),
    Breakage("an accumulator read in flight", "matrices", "sm_90", Kind.WGMMA_IN_FLIGHT,
             ACCUMULATOR, r"\1 mov.b32 \2, \2;"),
)  # fmt: skip
"""At least one for each kind."""


def run(breakage: Breakage) -> Outcome:
    """Run a broken kernel."""
    return RUNS[breakage.kernel](breakage.arch, breakage)
