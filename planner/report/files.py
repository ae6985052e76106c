"""The names of a checkpoint's files for people, and the list of all files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from planner.evaluation.record import FILE as EVALUATION
from planner.model.hub import companions
from planner.quantization.record import FILE as RECORDED
from vllm_moeq.format import CheckpointError, ShardSet
from vllm_moeq.format.shards import INDEX_NAME

PAGE = "report.html"
CARD = "README.md"
PICTURES = ("widths", "experts")
LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def picture(page: Path, name: str) -> Path:
    """Return the path of a page's picture: ``<page>-<name>.png`` beside the page."""
    return page.with_name(f"{page.stem}-{name}.png")


def checkpoint_files(folder: Path) -> dict[str, int]:
    """Return name → bytes for the files of a checkpoint: its shards, and files with names that moeq writes or copies.

    Raises:
        CheckpointError: damaged headers, or a name that is not a regular file.
    """
    with ShardSet(folder) as shards:
        names = {info.shard for info in shards.tensors.values()}
    ours = ("config.json", INDEX_NAME, "plan.json", RECORDED, EVALUATION, CARD, PAGE)
    names |= {
        name for name in (*ours, *(picture(Path(PAGE), part).name for part in PICTURES)) if (folder / name).exists()
    }
    names |= {*companions(folder), *(path.name for pattern in LICENSES for path in folder.glob(pattern))}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: expected a regular file")
    return {name: (folder / name).stat().st_size for name in sorted(names)}
