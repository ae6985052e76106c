"""A child process tries a peer with a small call before the benchmark depends on it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.kernels.peers import Setting, build, random_experts
from benchmarks.kernels.routing import Shape, route

ROOT = Path(__file__).parents[2]


class Probe:
    """A child process that builds and calls a peer on a small layer, before this process depends on it.

    It keeps crashes away, and the minutes that a driver may spend compiling a library that holds no code for the GPU
    (vLLM's Marlin on Hopper); the driver's cache then has the result.
    """

    def __init__(self, name: str, dtype: str) -> None:
        command = [sys.executable, "-m", "benchmarks.kernels.probe", name, dtype]
        self._began = time.monotonic()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, cwd=ROOT)

    def problem(self, patience: float) -> str:
        """Wait up to ``patience`` seconds and return why the peer must not be used, or an empty string."""
        try:
            status = self._process.wait(max(0.0, patience))
        except subprocess.TimeoutExpired:
            return f"a small call has not returned for {time.monotonic() - self._began:.0f} s"
        if status == 0:
            return ""
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"a small call failed with status {status}: {lines[-1] if lines else 'no output'}"

    def stop(self) -> None:
        """End the child if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def small_call(name: str, dtype: torch.dtype) -> None:
    """Build a peer for a small layer on the GPU and call it."""
    device, shape = torch.device("cuda", torch.cuda.current_device()), Shape(8, 2, 512, 256)
    packed = random_experts([1, 2, 2, 3, 3, 3, 3, 3], shape, 128, device)
    peer = build(name, Setting(shape, packed, 128, dtype, device))
    weights, ids = (tensor.to(device) for tensor in route("uniform", 4, shape, 0))
    peer.call(torch.randn((4, shape.hidden), device=device).to(dtype), weights, ids)
    torch.cuda.synchronize()


if __name__ == "__main__":
    small_call(sys.argv[1], getattr(torch, sys.argv[2]))
