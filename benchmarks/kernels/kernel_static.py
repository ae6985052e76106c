"""This script compiles the Triton kernels without a GPU and counts registers, spills and each loop's instructions.

python benchmarks/kernels/kernel_static.py [--arch sm_90 …] [--codings grid2,grid3 trellis2 …] [--json]

A coding is a scheme at a width. Each group of them, joined by commas, is compiled into one kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_moeq.kernels.activations import SILU, Activation
from vllm_moeq.kernels.triton import activate
from vllm_moeq.kernels.triton.arrange import arrange
from vllm_moeq.kernels.triton.codings import CODINGS, planes_in, rings_in, set_of
from vllm_moeq.kernels.triton.few import few_tokens
from vllm_moeq.kernels.triton.many import many_tokens
from vllm_moeq.kernels.triton.records import NO_CONSTANTS
from vllm_moeq.kernels.triton.schedule import FEW_TOKENS, MANY, Block, Schedule, schedule_few

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")},
}
CODES_PER_LANE = 16
BLOCK = 256
"""Inputs of a block."""
NUMBERS = {f"{coding.scheme.name}{coding.width}": number for number, coding in enumerate(CODINGS)}
DEFAULT = ("grid1,grid2,grid3", "grid1,grid2,grid3,grid4,grid8", "trellis1,trellis2,trellis3,trellis4")
ISSUES = 29e12
"""The instructions of single lanes that an H100 or H200 (132 multiprocessors) can issue in a second, about."""
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
KINDS = (
    ("mma", r"HMMA|HGMMA"),
    ("convert", r"I2F|F2F|I2HF|F2I"),
    ("float", r"H(FMA|ADD|MUL)2|F(FMA|ADD|MUL)"),
    ("memory", r"LD|ST|ATOM|RED"),
    ("integer", r"LOP3|SHF|PRMT|I(MAD|ADD|SETP|ABS|MNMX)|LEA|SEL|MOV|VIADD|V?IMNMX|PLOP3|U|R2U|S2"),
    ("other", r""),
)


@dataclass(frozen=True)
class Variant:
    """One kernel at fixed compile-time parameters.

    Attributes:
        gated: whether it is gate and up; else it is down.
        codings: names of codings, of :data:`NUMBERS`.
        activation: what follows gate and up.
        biased: whether the projection has biases.
    """

    kernel: str
    gated: bool
    schedule: Schedule
    codings: tuple[str, ...]
    group_size: int = 128
    lanes: int = 16
    dtype: str = "bf16"
    activation: Activation = SILU
    biased: bool = False

    @property
    def name(self) -> str:
        """Short description."""
        schedule = self.schedule
        projection = "gate_up" if self.gated else "down"
        return f"{self.kernel} {projection} {schedule.rows}x{schedule.tokens}"


def variants(codings: Sequence[str], dtype: str = "bf16", group_size: int = 128) -> Iterator[Variant]:
    """Every schedule of both kernels and both projections, of those that these codings meet."""
    block = Block(planes_in(set_of(NUMBERS[name] for name in codings)), 4 * BLOCK // group_size)
    few = list(dict.fromkeys(schedule_few(tokens, block) for tokens in range(1, FEW_TOKENS + 1)))
    for kernel, schedules in (("few_tokens", few), ("many_tokens", MANY)):
        for schedule in schedules:
            for gated in (True, False):
                yield Variant(kernel, gated, schedule, tuple(codings), group_size, dtype=dtype)


def constants_of(variant: Variant, arch: str) -> dict[str, Any]:
    """Return the compile-time parameters, as a layer of these codings has them."""
    few, schedule, block = variant.kernel == "few_tokens", variant.schedule, CODES_PER_LANE * variant.lanes
    codings = set_of(NUMBERS[name] for name in variant.codings)
    rings = rings_in(codings)
    groups = block // variant.group_size if False in rings else 0
    chunked = few and False in rings
    constants: dict[str, Any] = {
        "SHARE": 1, "ROWS": schedule.rows, "TOKENS": schedule.tokens, "LANES": variant.lanes, "CODINGS": codings,
        "GROUPS": groups, "SUM": 32 if chunked else block // max(groups, 1), "EVEN": True,
        **activate.constants_of(variant.activation if variant.gated else None),
        "STAGES": schedule.stages, "MODE": "plain" if TARGETS[arch].backend == "hip" else "ptx",
    }  # fmt: skip
    constants |= (
        {"SIDE": int(not variant.gated), "SLICES": schedule.slices, "FULL": variant.gated}
        if few
        else {"EXPERTS": 128, "TOGETHER": 8}
    )
    if not variant.biased:
        constants["biases"] = None
    return constants if variant.gated and True not in rings else {**constants, "out_sums": None}


def compiled(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], arch: str, **options: int) -> Any:
    """Compile ahead of time, as a call on aligned tensors does; return Triton's compiled kernel.

    Args:
        kernel: the kernel.
        constants: its compile-time parameters.
        pointers: the dtypes of its tensors; other parameters are integers.
        arch: a key of :data:`TARGETS`.
        options: Triton's, such as the number of warps.
    """
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
        if name not in ("pairs", "blocks", "ids", "local", "weights"):  # not specialized on
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[arch], options=options)


def compile_variant(variant: Variant, arch: str) -> Any:
    """Compile a projection; see :func:`compiled`."""
    few, schedule = variant.kernel == "few_tokens", variant.schedule
    constants = constants_of(variant, arch)
    pointers = {
        "x": variant.dtype, "sums": "fp32", "ids": "i32", "order": "i32", "counts": "i32", "weights": "fp32",
        "words": "i16", "scales": "i32", "table": "i32", "biases": "fp32", "records": "i32",
        "out": variant.dtype if variant.gated or not few else "fp32", "out_sums": "fp32",
    }  # fmt: skip
    options = {"num_warps": schedule.warps}
    if schedule.registers and constants["MODE"] == "ptx":
        options["maxnreg"] = schedule.registers
    return compiled(few_tokens if few else many_tokens, constants, pointers, arch, **options)


def compile_arrange(size: int, dtype: str, arch: str) -> Any:
    """Compile the launch before down in a layer with grids and trellises; ``size``: of the rotation, or 0."""
    constants = {
        "LANES": 16, "SIZE": size, "PLAIN": True, "RINGS": True, "SUM": 128, **NO_CONSTANTS, "up": None, "down": None,
        "splits": None, "records": None, "ids": None,
    }  # fmt: skip
    pointers = {"x": dtype, "local": "i32", "signs": "i32", "out": dtype, "sums": "fp32"}
    return compiled(arrange, constants if size else {**constants, "signs": None}, pointers, arch, num_warps=2)


@dataclass(frozen=True)
class Report:
    """One row of the table; counts per loop are the worst of the codings' loops."""

    arch: str
    variant: str
    dtype: str
    codings: tuple[str, ...]
    registers: int
    spill_bytes: int
    shared_bytes: int
    loops: int
    i2f_in_loop: int
    async_copies_in_loop: int
    per_weight: dict[str, float]

    @property
    def total(self) -> float:
        """Instructions of one lane per weight."""
        return sum(self.per_weight.values())

    @property
    def bandwidth(self) -> str:
        """The terabytes of codes per second at which :data:`ISSUES` is reached, if there is only one coding."""
        if len(self.codings) > 1:
            return ""
        return f"{ISSUES / self.total * CODINGS[NUMBERS[self.codings[0]]].width / 8 / 1e12:.2f}"


def cuobjdump(flag: str, kernel: Any) -> str:
    """Run the cuobjdump of Triton's wheel on a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout


def usage_of(kernel: Any) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that it spills."""
    usage = cuobjdump("-res-usage", kernel)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage}")
    return int(found[1]), int(found[2])


def loops_of(sass: str) -> list[Counter[str]]:
    """Return opcode counts of each innermost loop that multiplies."""
    code = [(int(m[1], 16), m[2]) for m in map(INSTRUCTION.match, sass.splitlines()) if m]
    ranges = []
    for address, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            ranges.append((int(branch[1], 16), address))
    loops = []
    for begin, end in ranges:
        inside = [text for address, text in code if begin <= address <= end]
        opcodes = Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in inside)
        innermost = not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in ranges)
        if innermost and (opcodes["HMMA"] or opcodes["HGMMA"]):
            loops.append(opcodes)
    return loops


def report(variant: Variant, arch: str) -> Report:
    """Compile for an NVIDIA GPU and read the machine code."""
    kernel = compile_variant(variant, arch)
    registers, spilled = usage_of(kernel)
    loops = loops_of(cuobjdump("-sass", kernel))
    schedule = variant.schedule
    lanes = schedule.warps * 32 / (schedule.slices * schedule.rows * CODES_PER_LANE * variant.lanes)
    kinds = [Counter(kind_of(opcode) for opcode in loop.elements()) for loop in loops]
    return Report(
        arch, variant.name, variant.dtype, variant.codings, registers, spilled, int(kernel.metadata.shared),
        loops=len(loops),
        i2f_in_loop=max(sum(n for op, n in loop.items() if op.startswith("I2F")) for loop in loops),
        async_copies_in_loop=min(loop["LDGSTS"] for loop in loops),
        per_weight={name: round(max(kind[name] for kind in kinds) * lanes, 2) for name, _ in KINDS},
    )  # fmt: skip


def kind_of(opcode: str) -> str:
    """Return what an opcode does."""
    return next(name for name, pattern in KINDS if re.match(pattern, opcode))


def main() -> None:
    """Print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--arch", nargs="+", default=["sm_80", "sm_90"], choices=[a for a in TARGETS if TARGETS[a].backend == "cuda"]
    )
    parser.add_argument("--codings", nargs="+", default=DEFAULT, help=f"of {', '.join(NUMBERS)}")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=["bf16", "fp16"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="variants compiled at a time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    work = [
        (variant, arch)
        for arch in args.arch
        for text in args.codings
        for dtype in args.dtype
        for variant in variants(text.split(","), dtype, args.group_size)
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(report, *zip(*work, strict=True)))
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    kinds = [name for name, _ in KINDS]
    print("| arch | kernel | dtype | codings | registers | spill bytes | shared KiB | I2F | async copies |", end="")
    print(" | ".join(["", *kinds, "all", "TB/s"])[2:] + " |")
    print("|" + "---|" * (11 + len(kinds)))
    for row in rows:
        codings = ",".join(row.codings)
        print(
            f"| {row.arch} | {row.variant} | {row.dtype} | {codings} | {row.registers} | {row.spill_bytes} "
            f"| {row.shared_bytes / 1024:.1f} | {row.i2f_in_loop} | {row.async_copies_in_loop} | "
            + " | ".join(f"{row.per_weight[kind]:.2f}" for kind in kinds)
            + f" | {row.total:.2f} | {row.bandwidth} |"
        )


if __name__ == "__main__":
    main()
