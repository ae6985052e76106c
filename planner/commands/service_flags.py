"""The flags that say what is to be served."""

from __future__ import annotations

from typing import Annotated

import typer

Context = Annotated[int, typer.Option("--context", min=1, help="Dry run: tokens of each request that is served.")]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Dry run: requests served at a time.")]
GpuGib = Annotated[float, typer.Option("--gpu-gib", help="Dry run: memory of one GPU, GiB.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what it would write and take, from the headers; do nothing.")
]
