"""Choose the runner by the command's flags."""

from __future__ import annotations

import torch

from planner.quantization.runners.base import Runner
from planner.quantization.runners.inline import InlineRunner
from planner.quantization.runners.processes import ProcessRunner
from planner.quantization.runners.ray_cluster import RayRunner, import_ray
from vllm_moeq.format import UsageError


def choose_runner(jobs: int | None = None, device: str = "cpu", ray: bool = False) -> Runner:
    """Return the runner for some flags.

    Args:
        jobs: number of layers at a time; None for one per device (with Ray: per machine or GPU).
        device: ``cpu``, ``cuda`` (every GPU) or a list such as ``cuda:0,cuda:1``.
        ray: whether to run on a Ray cluster.

    Raises:
        UsageError: unknown or missing devices, fewer jobs than one or than devices, Ray not installed.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, found {jobs}")
    if ray:
        if device not in ("cpu", "cuda"):
            raise UsageError(f"--device: with --ray expected cpu or cuda, found {device!r}")
        import_ray()
        return RayRunner(jobs, device)
    devices = read_devices(device)
    count = jobs or len(devices)
    if count < len(devices):
        raise UsageError(f"--jobs: expected at least one per device ({len(devices)}), found {count}")
    threads = max(1, torch.get_num_threads() // count)
    if count == 1:
        return InlineRunner(threads, devices[0])
    return ProcessRunner(threads, [devices[index % len(devices)] for index in range(count)])


def read_devices(text: str) -> list[str]:
    """Return the names in a comma-separated list of devices; ``cuda`` alone means all GPUs.

    Raises:
        UsageError: a repeated device, or one that torch does not know or this machine does not have.
    """
    names = [part.strip() for part in text.split(",")]
    if names == ["cuda"]:
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or names
    if len(set(names)) < len(names):
        raise UsageError(f"--device: expected each device once, found {text!r}")
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device: expected cpu, cuda or a list such as cuda:0,cuda:1, found {text!r}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device: {name}: torch sees {torch.cuda.device_count()} GPUs")
    return names
