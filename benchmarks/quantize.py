"""Speed and error of the quantizers beside the hqq package, one expert matrix, one run.

python benchmarks/quantize.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from hqq.core.quantize import Quantizer as PackageHqq

from planner.quantizers import quantize_hqq, quantize_rtn, quantize_sign
from vllm_moeq.format import pack


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of ``repeats`` calls after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def package_hqq(weight: torch.Tensor, bits: int, group_size: int) -> Any:
    """Return packed codes and their description from the hqq package at its default settings."""
    return PackageHqq.quantize(
        weight.clone(),
        nbits=bits,
        group_size=group_size,
        axis=1,
        optimize=True,
        round_zero=bits == 4,
        device="cpu",
        compute_dtype=torch.float32,
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=3584)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    weight = torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)) * 0.02
    floor = median_seconds(lambda: weight.bfloat16().float(), args.repeats)
    print(f"{weight.numel():,} weights, {torch.get_num_threads()} threads; one read and write: {floor * 1e3:.2f} ms\n")
    print("| quantizer | bits | ms, packed | M weights/s | hqq package, ms | times faster | error / package's |")
    print("|---|---|---|---|---|---|---|")
    for bits in (2, 3, 4, 8):
        theirs = median_seconds(lambda: package_hqq(weight, bits, args.group_size), args.repeats)  # noqa: B023
        restored = PackageHqq.dequantize(*package_hqq(weight, bits, args.group_size))
        reference = (restored.float().reshape(weight.shape) - weight).abs().mean()
        for name, quantizer in (("hqq", quantize_hqq), ("rtn", quantize_rtn)):
            ours = median_seconds(lambda: pack(quantizer(weight, bits, args.group_size).codes, bits), args.repeats)  # noqa: B023
            error = (quantizer(weight, bits, args.group_size).dequantize() - weight).abs().mean() / reference
            versus = f"{theirs * 1e3:.1f} | {theirs / ours:.2f}" if name == "hqq" else "|"
            rate = weight.numel() / ours / 1e6
            print(f"| {name} | {bits} | {ours * 1e3:.1f} | {rate:.1f} | {versus} | {float(error):.4f} |")
    sign = median_seconds(lambda: pack(quantize_sign(weight, 1, args.group_size).codes, 1), args.repeats)
    print(f"| sign | 1 | {sign * 1e3:.1f} | {weight.numel() / sign / 1e6:.1f} | | | |")
    codes = quantize_rtn(weight, 3, args.group_size).codes
    packing = median_seconds(lambda: pack(codes, 3), args.repeats)
    print(f"| pack | 3 | {packing * 1e3:.1f} | {weight.numel() / packing / 1e6:.1f} | | | |")


if __name__ == "__main__":
    main()
