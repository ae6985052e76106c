"""The flags that say what a dry run's output is to serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from planner.estimates import Service


@dataclass(frozen=True)
class ServiceFlags:
    """The load that the quantized model is to serve."""

    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help=f"Dry run, preset: tokens of each request [{Service.context}]."),
    ] = None
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            min=1,
            help=f"Dry run, preset: requests at a time [{Service.concurrency}, or the preset's].",
        ),
    ] = None
    gpu_gib: Annotated[
        float | None,
        typer.Option(
            "--gpu-gib", help=f"Dry run, preset: memory of one GPU, GiB [{Service.gpu_gib:g}, or the preset's]."
        ),
    ] = None
