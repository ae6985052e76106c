"""This benchmark times the linears of attention on the CPU: packed in the native kernel, and dense in torch.

    python benchmarks/kernels/cpu_linear.py --tokens 1,8,32,128 --bits 4

The linears are the query, key and value projection and the output projection of a layer of Qwen3-30B-A3B. Eight layers
are called in turn, so that each finds its weights in memory. Both ways run in turn on all cores, and Intel's OpenMP is
preloaded if it is installed. vLLM uses the dense product on a CPU without AVX-512, where it has no kernel for 4 bits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # Python puts the script's own folder there

from benchmarks.common.cpu import restart_with_openmp
from vllm_moeq.kernels.cpu.layer import instruction_sets
from vllm_moeq.kernels.cpu.linear import NativeLinear

SHAPES = ((5120, 2048), (2048, 4096))
LAYERS, ROUNDS, GROUP = 8, 7, 128


def packed(rows: int, columns: int, bits: int) -> NativeLinear:
    """Return a linear of random codes."""
    words = torch.randint(-(2**31), 2**31, (rows, columns * bits // 32)).int()
    return NativeLinear(words, (torch.rand(rows, columns // GROUP) * 0.01).bfloat16(), bits)


def milliseconds(dtype: torch.dtype, bits: int, tokens: list[int]) -> list[tuple[int, float, float]]:
    """Return tokens, and the medians for one layer: packed, dense."""
    dense = [torch.randn(shape).to(dtype) for shape in SHAPES * LAYERS]
    ours = [packed(*shape, bits) for shape in SHAPES * LAYERS]
    result = []
    for count in tokens:
        inputs = {columns: torch.randn(count, columns).to(dtype) for _, columns in SHAPES}
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for linear in ours:
                linear(inputs[linear.columns])
            between = time.perf_counter()
            for weight in dense:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            times[0].append(between - began)
            times[1].append(time.perf_counter() - between)
        first, second = (statistics.median(each) / LAYERS * 1e3 for each in times)
        result.append((count, first, second))
    return result


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,32,128", help="numbers of tokens")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    args = parser.parse_args()
    restart_with_openmp()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{instruction_sets()[-1]}, {torch.get_num_threads()} threads, {args.bits} bits")
    print("| activations | tokens | packed, ms | dense, ms | speedup |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for count, ours, dense in milliseconds(dtype, args.bits, [int(part) for part in args.tokens.split(",")]):
            print(f"| {str(dtype).removeprefix('torch.')} | {count} | {ours:.2f} | {dense:.2f} | {dense / ours:.2f} |")


if __name__ == "__main__":
    main()
