"""The flags that say what a dry run's output is to serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from planner.api.keywords.service import ServiceKeywords


@dataclass(frozen=True)
class ServiceFlags:
    """The load that the quantized model is to serve."""

    context: Annotated[
        int, typer.Option("--context", min=1, help="Dry run: tokens of each request that is served.")
    ] = ServiceKeywords.context
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Dry run: requests served at a time.")] = (
        ServiceKeywords.concurrency
    )
    gpu_gib: Annotated[float, typer.Option("--gpu-gib", help="Dry run: memory of one GPU, GiB.")] = (
        ServiceKeywords.gpu_gib
    )
