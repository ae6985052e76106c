"""The names of a checkpoint's files for people, and the list of all files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from planner.evaluation.record import FILE as EVALUATION
from planner.evaluation.record import read_evaluations
from planner.model.hub import companions
from planner.quantization.record import FILE as RECORDED
from vllm_moeq.format import CheckpointError, ShardSet, read_json
from vllm_moeq.format.files import check_inside
from vllm_moeq.format.shards import INDEX_NAME

PAGE = "report.html"
CARD = "README.md"
PICTURES = ("widths", "experts")
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "USE_POLICY.md")
MAX_BYTES = 64 << 20
"""The largest page, picture, card or licence."""

PNG = b"\x89PNG\r\n\x1a\n"


def picture(page: Path, name: str) -> Path:
    """Return the path of a page's picture: ``<page>-<name>.png`` beside the page."""
    return page.with_name(f"{page.stem}-{name}.png")


def checkpoint_files(folder: Path) -> dict[str, int]:
    """Return name → bytes for the files of a checkpoint: its shards, and files with names that moeq writes or copies.

    Raises:
        CheckpointError: damaged headers, or a name that is no regular file of this folder or of the Hub's cache.
        MoeqError: a file that is not what its name says: a picture, JSON, the results of evaluations, or of bounded
            size.
    """
    with ShardSet(folder) as shards:
        names = {info.shard for info in shards.tensors.values()}
    ours = ("config.json", INDEX_NAME, "plan.json", RECORDED, EVALUATION, CARD, PAGE, *LICENSES)
    pictures = [picture(Path(PAGE), part).name for part in PICTURES]
    records = {name for name in (*ours, *pictures) if (folder / name).exists() or (folder / name).is_symlink()}
    names |= records
    names |= set(companions(folder))
    for name in names:
        check_inside(folder / name, folder)
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: expected a regular file")
    for name in records:
        _check_record(folder / name, name in pictures)
    read_evaluations(folder)
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def _check_record(path: Path, is_picture: bool) -> None:
    """Refuse a file under one of our names that we would not have written.

    Raises:
        CheckpointError: it is larger than :data:`MAX_BYTES`, or no picture.
        ConfigError: it is no JSON.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_BYTES} bytes, found {size}")
    if path.suffix == ".json":
        read_json(path)
    if is_picture:
        with path.open("rb") as file:
            if file.read(len(PNG)) != PNG:
                raise CheckpointError(f"{path}: expected a PNG picture, found something else")


def other_files(folder: Path) -> list[str]:
    """Return the names of what else lies in a checkpoint's folder, which nobody uploads.

    Raises:
        CheckpointError: a link leads out of the folder; who made it may have meant it to be uploaded.
    """
    known = {Path(name).parts[0] for name in checkpoint_files(folder)}
    others = sorted(path for path in folder.iterdir() if path.name not in known)
    for path in others:
        check_inside(path)
    return [path.name for path in others]
