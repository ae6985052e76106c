"""The keyword arguments that say where and how a run computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner.api.keywords.common import Count
from planner.quantization.quantizers.table import calibrated_names
from planner.quantization.runners import Runner, choose_runner
from planner.quantization.runners.choose import read_devices
from planner.quantization.speculation import Mtp
from vllm_moeq.format import UsageError


def first_device(name: str) -> torch.device:
    """Return the first of some devices: a model that reads a text layer by layer uses one.

    Raises:
        UsageError: devices that are not there.
    """
    return torch.device(read_devices(name)[0])


@dataclass(frozen=True, kw_only=True)
class ResumeKeyword:
    """Whether a run continues an unfinished one.

    Attributes:
        resume: continue an unfinished run; otherwise it is deleted.
    """

    resume: bool = True


@dataclass(frozen=True, kw_only=True)
class RunKeywords(ResumeKeyword):
    """The devices of a run.

    Attributes:
        device: devices to compute on: ``cpu``, ``cuda`` or ``cuda:0,cuda:1``.
    """

    device: str = "cpu"

    def first_device(self) -> torch.device:
        """Return the first device; raise UsageError for one that is not there."""
        return first_device(self.device)


@dataclass(frozen=True, kw_only=True)
class CompareRunKeywords(RunKeywords):
    """The same for a comparison.

    Attributes:
        jobs: models quantized at a time, a process each.
    """

    jobs: Count = 1


@dataclass(frozen=True, kw_only=True)
class MtpKeyword:
    """What becomes of layers for speculative decoding.

    Attributes:
        mtp: layers for speculative decoding (MTP): ``drop`` them, or ``keep`` them in 16 bits.
    """

    mtp: Mtp = "drop"


@dataclass(frozen=True, kw_only=True)
class QuantizeRunKeywords(RunKeywords):
    """The same for quantizing.

    Attributes:
        jobs: layers at a time, a process each; None is one per device.
        ray: layers on a Ray cluster (``RAY_ADDRESS``) with a shared file system.
    """

    jobs: Count | None = None
    ray: bool = False

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
                f"--ray: expected a quantizer without calibration; with {' or '.join(calibrated_names())} each layer "
                "reads what the quantized layers before it produce (--jobs and several devices share the experts of a "
                "layer)"
            )
        return self.job_devices()
