"""The files of a checkpoint that are there for people, and which files belong to a checkpoint at all."""

from __future__ import annotations

from pathlib import Path

from planner.evaluation.record import FILE as EVALUATION
from planner.model.hub import COMPANIONS
from planner.quantization.record import FILE as RECORDED
from vllm_moeq.format import CheckpointError, ShardSet
from vllm_moeq.format.shards import INDEX_NAME

PAGE = "report.html"
CARD = "README.md"
PICTURES = ("widths", "experts")
LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def picture(page: Path, name: str) -> Path:
    """Return where a picture of a page goes: beside it, ``<page>-<name>.png``."""
    return page.with_name(f"{page.stem}-{name}.png")


def checkpoint_files(folder: Path) -> dict[str, int]:
    """Return name → bytes of what belongs to a checkpoint: its shards, and the files with names that we write or copy.

    Raises:
        CheckpointError: damaged headers, a file that is not a regular one.
    """
    with ShardSet(folder) as shards:
        names = {info.shard for info in shards.tensors.values()}
    ours = ("config.json", INDEX_NAME, "plan.json", RECORDED, EVALUATION, CARD, PAGE)
    names |= {
        name for name in (*ours, *(picture(Path(PAGE), part).name for part in PICTURES)) if (folder / name).exists()
    }
    names |= {path.name for pattern in (*COMPANIONS, *LICENSES) for path in folder.glob(pattern)}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: expected a regular file")
    return {name: (folder / name).stat().st_size for name in sorted(names)}
