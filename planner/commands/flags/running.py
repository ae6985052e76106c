"""The flags that say where and how a command computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from planner.commands.flags.common import Device, Resume
from planner.quantization.quantizers.table import QUANTIZERS
from planner.quantization.runners import Runner, choose_runner
from planner.quantization.runners.choose import read_devices
from vllm_moeq.format import UsageError


def _calibrated() -> str:
    """Return the quantizers with calibration, for messages and help texts."""
    return " or ".join(name for name, row in QUANTIZERS.items() if row.calibrated)


def first_device(name: str) -> torch.device:
    """Return the first device of ``--device``: a model that reads a text layer by layer uses one.

    Raises:
        UsageError: devices that are not there.
    """
    return torch.device(read_devices(name)[0])


@dataclass(frozen=True)
class RunFlags:
    """The devices of a command, and whether it continues an unfinished run."""

    device: Device = "cpu"
    resume: Resume = True

    def first_device(self) -> torch.device:
        """Return the first device; raise UsageError for one that is not there."""
        return first_device(self.device)


@dataclass(frozen=True)
class CompareRunFlags(RunFlags):
    """The same for ``moeq compare``."""

    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Models quantized at a time, a process each.")] = 1


@dataclass(frozen=True)
class QuantizeRunFlags(RunFlags):
    """The same for ``moeq quantize``."""

    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Layers at a time, a process each [one per device].")
    ] = None
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help=f"Layers on a Ray cluster (RAY_ADDRESS) with a shared file system; not with {_calibrated()}."
        ),
    ] = False

    def runner(self) -> Runner:
        """Return the runner that quantizes layers independently of each other.

        Raises:
            UsageError: devices that are not there, fewer jobs than devices, Ray not installed.
        """
        return choose_runner(self.jobs, self.device, self.ray)

    def job_devices(self) -> tuple[torch.device, ...]:
        """Return the device of each job.

        Raises:
            UsageError: devices that are not there, fewer jobs than devices.
        """
        names = read_devices(self.device)
        count = self.jobs or len(names)
        if count < len(names):
            raise UsageError(f"--jobs: expected at least one per device ({len(names)}), found {count}")
        return tuple(torch.device(names[index % len(names)]) for index in range(count))

    def expert_devices(self) -> tuple[torch.device, ...]:
        """Return the devices of a quantizer with calibration: each takes a batch of a layer's experts at a time.

        Raises:
            UsageError: devices that are not there, fewer jobs than devices, a cluster.
        """
        read_devices(self.device)
        if self.ray:
            raise UsageError(
                f"--ray: expected a quantizer without calibration; with {_calibrated()} each layer reads what the "
                "quantized layers before it produce (--jobs and several devices share the experts of a layer)"
            )
        return self.job_devices()
