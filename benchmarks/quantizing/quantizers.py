"""This benchmark compares speed, memory and error of our quantizers with those of the packages hqq and gptqmodel.

All quantize the same matrix. Each case runs in its own process, the cases in turn, several times; the table shows
medians. Peak memory excludes the weights and second moments. The output error is the distance from what the original
weights give for the original model's inputs to what the quantized weights give for the quantized model's inputs, which
are a tenth off.

    python benchmarks/quantizing/quantizers.py
    python benchmarks/quantizing/quantizers.py --rows 14336 --columns 4096 --bits 2 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 128
MIB = 1 << 20


@dataclass(frozen=True)
class Problem:
    """A matrix and its inputs.

    Attributes:
        weight: W, float32 [N, K].
        moments: mean of x·xᵀ over the quantized model's inputs x, float32 [K, K].
        shift: mean of (o − x)·xᵀ with the original model's inputs o, float32 [K, K].
    """

    weight: torch.Tensor
    moments: torch.Tensor
    shift: torch.Tensor


Case = Callable[[Problem, int], Any]
"""(problem, bits) → dequantized weights, or what ``restore`` makes them of."""


def ours(name: str) -> Case:
    """Return one of our quantizers without calibration, packing included."""
    from planner.quantization.quantizers import quantizer_for

    def run(problem: Problem, bits: int) -> Any:
        result = quantizer_for(bits, name, name)(problem.weight, bits, GROUP)
        result.tensors()
        return result

    return run


def our_gptq(*, asymmetric: bool = False, **settings: Any) -> Case:
    """Return our GPTQ, packing included."""
    from planner.quantization.quantizers.gptq import GptqSettings, quantize_gptq
    from planner.quantization.quantizers.target import Aim

    def run(problem: Problem, bits: int) -> Any:
        aim = Aim(problem.shift[None]) if asymmetric else None
        weights, moments = problem.weight[None], problem.moments[None].clone()
        result = quantize_gptq(weights, moments, bits, GROUP, GptqSettings(**settings), aim=aim)[0]
        result.tensors()
        return result

    return run


def package_hqq() -> Case:
    """Return the hqq package at its default settings."""
    from hqq.core.quantize import Quantizer

    def run(problem: Problem, bits: int) -> Any:
        return Quantizer.quantize(
            problem.weight.clone(),
            nbits=bits,
            group_size=GROUP,
            axis=1,
            optimize=True,
            round_zero=bits == 4,
            device="cpu",
            compute_dtype=torch.float32,
        )

    return run


def package_gptq() -> Case:
    """Return GPTQModel's GPTQ with the range of each group as its scale, columns in their order."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its default fails on small machines
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    def run(problem: Problem, bits: int) -> Any:
        config = QuantizeConfig(
            bits=bits,
            group_size=GROUP,
            sym=False,
            desc_act=False,
            act_group_aware=False,
            damp_percent=0.01,
            offload_to_disk=False,
            fallback=None,
        )
        linear = torch.nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
        linear.weight.data = problem.weight.clone()
        task = GPTQ(linear, config)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples, task._hessian_dirty = problem.moments.clone(), 1, False
        return task.quantize(blocksize=128)[0]

    return run


CASES: dict[str, tuple[Callable[[], Case], str | None]] = {
    "rtn": (lambda: ours("rtn"), None),
    "hqq": (lambda: ours("hqq"), "hqq package"),
    "hqq package": (package_hqq, None),
    "gptq, same settings": (lambda: our_gptq(act_order="none", search="range", sweeps=0), "gptqmodel package"),
    "gptqmodel package": (package_gptq, None),
    "gptq, symmetric, no pass": (lambda: our_gptq(sweeps=0), "gptqmodel package"),
    "gptq, our defaults": (lambda: our_gptq(asymmetric=True), "gptqmodel package"),
}
"""Row → (what it runs, the row that it is compared with)."""


def restore(result: Any) -> torch.Tensor:
    """Return dequantized weights of whatever a case returned."""
    if isinstance(result, torch.Tensor):
        return result.float()
    if isinstance(result, tuple):
        from hqq.core.quantize import Quantizer

        found: torch.Tensor = Quantizer.dequantize(*result)
        return found.float()
    values: torch.Tensor = result.dequantize()
    return values


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_case(name: str, folder: Path, bits: int) -> dict[str, float]:
    """Time one case here."""
    stored = load_file(folder / "problem.safetensors")
    weight, inputs, original = (stored[key] for key in ("weight", "inputs", "original"))
    moments, shift = inputs.mT @ inputs / len(inputs), (original - inputs).mT @ inputs / len(inputs)
    case = CASES[name][0]()
    case(Problem(weight[:128], moments, shift), bits)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began = time.perf_counter()
    result = case(Problem(weight, moments, shift), bits)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before
    found = restore(result).reshape(weight.shape)
    wanted = original @ weight.mT
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "weight_error": float((found - weight).norm() / weight.norm()),
        "output_error": float((inputs @ found.mT - wanted).norm() / wanted.norm()),
    }


def make_problem(folder: Path, rows: int, columns: int) -> None:
    """Write random weights and correlated inputs, in the original model and in the quantized one."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn((columns, columns), generator=generator) * (0.5 / columns**0.5) + torch.eye(columns)
    original = torch.randn((2 * columns, columns), generator=generator) @ mixing
    inputs = original + 0.1 * torch.randn((2 * columns, columns), generator=generator) @ mixing
    weight = torch.randn((rows, columns), generator=generator) * 0.02
    save_file({"weight": weight, "inputs": inputs, "original": original}, folder / "problem.safetensors")


def measure(folder: Path, bits: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return the medians of every case, the cases in turn."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name in CASES:
            command = [sys.executable, __file__, "--case", name, "--folder", str(folder), "--bits", str(bits)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3584)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.folder, args.bits[0])))
        return
    weights = args.rows * args.columns
    if not args.json:
        print(f"{args.rows} × {args.columns} weights, groups of {GROUP}, {torch.get_num_threads()} threads\n")
        print("| quantizer | bits | M weights/s | times faster | peak MiB | weight error | output error |")
        print("|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_problem(folder, args.rows, args.columns)
        for bits in args.bits:
            found = measure(folder, bits, args.repeats)
            for name, values in found.items():
                rival = CASES[name][1]
                ratio = found[rival]["seconds"] / values["seconds"] if rival else None
                rows.append({"quantizer": name, "bits": bits, "weights": weights, "times_faster": ratio, **values})
                if not args.json:
                    print(
                        f"| {name} | {bits} | {weights / values['seconds'] / 1e6:.2f} | "
                        f"{f'{ratio:.2f}' if ratio else ''} | {values['peak_bytes'] / MIB:.0f} | "
                        f"{values['weight_error']:.4f} | {values['output_error']:.4f} |",
                        flush=True,
                    )
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
