"""Quantize expert matrices with the hqq package at its defaults; it reads no text."""

from __future__ import annotations

import time

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file, save_file

from benchmarks.peers.processes.job import read_job


def main() -> None:
    """Do the job."""
    job, found = read_job(), {}
    matrices = load_file(job.experts)
    began = time.perf_counter()
    for name, weight in matrices.items():
        found[name] = Quantizer.quantize(
            weight.clone(), nbits=job.bits, group_size=job.group, axis=1, device="cpu", compute_dtype=torch.float32,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    save_file({name: Quantizer.dequantize(*parts).contiguous() for name, parts in found.items()}, job.output)
    job.finish(seconds, ("hqq", "torch"))


if __name__ == "__main__":
    main()
