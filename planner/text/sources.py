"""What a flag for texts names: a file, or a dataset on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.common.install import require
from planner.text.documents import Document, document_of
from planner.text.formats import read_documents
from vllm_moeq.format import UsageError


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset on the Hub, at a fixed commit."""

    path: str
    config: str | None
    split: str
    revision: str


DATASETS = {
    "wikitext2": Dataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "train", "b08601e04326c79dfdd32d625aee71d232d685c3"
    ),
    "c4": Dataset("allenai/c4", "en", "train", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"),
}
"""Datasets that ``--data`` knows by name; any other dataset is ``owner/name[:config]@commit``."""

NAMED = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?@([0-9a-f]{40})")


def documents(data: str, characters: int) -> Iterator[Document]:
    """Yield the documents of a file or a dataset.

    Args:
        data: a file, see :func:`planner.text.formats.read_documents`; a name in :data:`DATASETS`; or
            ``owner/name[:config]@commit``.
        characters: most characters to read of a plain text.

    Raises:
        MoeqError: there is no such file or dataset, or it is damaged.
    """
    path = Path(data)
    if data and (path.exists() or path.is_symlink()):
        return read_documents(path, characters)
    dataset = _dataset(data)
    if dataset is not None:
        return _read(dataset)
    raise UsageError(
        f"--data: expected a text file, one of {', '.join(DATASETS)}, or owner/name[:config]@<40-digit commit>, "
        f"found {data!r:.200}, which is none of them and no file"
    )


def is_dataset(data: str) -> bool:
    """Tell whether a text is read from the Hub: no file has its name, and a dataset does."""
    return not Path(data).exists() and _dataset(data) is not None


def _dataset(data: str) -> Dataset | None:
    """Return the dataset of a name, or None."""
    named = NAMED.fullmatch(data)
    return DATASETS.get(data) if named is None else Dataset(named[1], named[2], "train", named[3])


def _read(dataset: Dataset) -> Iterator[Document]:
    require(f"--data {dataset.path}", ("datasets",), "calibrate")
    import datasets

    name = f"--data {dataset.path}@{dataset.revision[:8]}"
    try:
        rows = datasets.load_dataset(
            dataset.path, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
        for number, row in enumerate(rows, start=1):
            document = document_of(row, f"{name}: row {number}")
            if document.text is None or document.text.strip():
                yield document
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{name}: cannot be read ({reason})") from None
