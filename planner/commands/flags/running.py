"""The flags that say where and how a command computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from planner.api.keywords.running import CompareRunKeywords, MtpKeyword, QuantizeRunKeywords, RunKeywords
from planner.commands.flags.common import Device, Resume
from planner.quantization.quantizers.table import calibrated_names
from planner.quantization.speculation import Mtp


@dataclass(frozen=True)
class RunFlags:
    """The devices of a command, and whether it continues an unfinished run."""

    device: Device = RunKeywords.device
    resume: Resume = RunKeywords.resume


@dataclass(frozen=True)
class CompareRunFlags(RunFlags):
    """The same for ``moeq compare``."""

    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Models quantized at a time, a process each.")] = (
        CompareRunKeywords.jobs
    )


@dataclass(frozen=True)
class QuantizeRunFlags(RunFlags):
    """The same for ``moeq quantize``."""

    mtp: Annotated[
        Mtp,
        typer.Option("--mtp", help="Layers for speculative decoding (MTP): drop them, or keep them in 16 bits."),
    ] = MtpKeyword.mtp

    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Layers at a time, a process each [one per device].")
    ] = QuantizeRunKeywords.jobs
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Layers on a Ray cluster (RAY_ADDRESS) with a shared file system; not with "
            f"{' or '.join(calibrated_names())}.",
        ),
    ] = QuantizeRunKeywords.ray
