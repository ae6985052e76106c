"""The archive that a stranger sends: results and logs, without what names the machine, its user or their files."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import io
import os
import re
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

TEXTS = (".md", ".json", ".log", ".txt")
PICTURES = (".png",)
LARGEST = 8 << 20
"""Bytes of a file that is sent; of a longer log the end is."""

NOT_SENT = ("prompts.json",)
"""Files that hold pieces of a user's text."""

MODEL_FILE = "config.json"
"""A folder with this file is a model's."""

COMMON = frozenset(("root", "user", "ubuntu", "debian", "nobody", "localhost", "gpu", "cuda", "linux", "test"))
"""Names of users and machines that tell nothing, and stand in logs as ordinary words."""

ADDRESS = re.compile(r"\b(?!127\.0\.0\.1\b|0\.0\.0\.0\b)\d{1,3}(?:\.\d{1,3}){3}\b")
IDENTITY = re.compile(r"\b(?:GPU|MIG)-[0-9a-fA-F]{8}(?:-[0-9a-fA-F]+)+")
MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
PACKAGED = re.compile(r"""~?/[^\s'"]*?/(?=(?:site|dist)-packages/)""")
FOREIGN = re.compile(r"""(?:(?<![\w.:/~\]>])|(?<=-[IL]))~?/(?=[\w.~-])[^\s'",;:()<>\[\]]*""")
"""A path from the root, and not the rest of an address or of a relative path."""

TELLING = 5
"""Characters from which on a name is also found inside of words."""


class Scrubber:
    """Replaces what identifies.

    Args:
        folders: folder → what stands in its place; the deepest folder counts.
        names: names of users and machines.
    """

    def __init__(self, folders: dict[Path, str], names: list[str]) -> None:
        spelled = {str(each): label for folder, label in folders.items() for each in (folder, folder.resolve())}
        self._folders = sorted(spelled.items(), key=lambda item: -len(item[0]))
        telling = sorted({name for name in names if name.lower() not in COMMON}, key=len, reverse=True)
        self._names = [re.compile(_anywhere(name), re.IGNORECASE) for name in telling]

    def __call__(self, text: str) -> str:
        """Return the text without folders, other paths, users, machines, addresses and GPUs' numbers."""
        text = PACKAGED.sub("", text)
        for folder, label in self._folders:
            if len(folder) > 1:
                text = re.sub(rf"{re.escape(folder)}(?![\w-])", label, text)
        text = FOREIGN.sub("PATH", text)
        for pattern, label in ((IDENTITY, "GPU"), (MAIL, "MAIL"), (ADDRESS, "ADDRESS")):
            text = pattern.sub(label, text)
        for name in self._names:
            text = name.sub("NAME", text)
        return text


def _anywhere(name: str) -> str:
    """Return the pattern of a name; short ones are parts of other words."""
    bounds = ("(?<![A-Za-z0-9])", "(?![A-Za-z0-9])") if len(name) < TELLING else ("", "")
    return re.escape(name).join(bounds)


def names_here() -> list[str]:
    """Return this machine's names and its user's."""
    found = [socket.gethostname(), os.environ.get("HOSTNAME", ""), Path.home().name]
    found += [name.split(".")[0] for name in found]
    found += [os.environ.get(variable, "") for variable in ("USER", "LOGNAME", "SUDO_USER")]
    with contextlib.suppress(KeyError, OSError):
        found.append(getpass.getuser())
    return [name for name in found if name]


def sent(folder: Path) -> Iterator[Path]:
    """Yield the files that are sent: no weights, nothing of a model's folder, no links, no pieces of texts."""
    for root, folders, files in os.walk(folder):
        if MODEL_FILE in files:
            folders.clear()
            continue
        folders.sort()
        for name in sorted(files):
            path = Path(root, name)
            if path.suffix in (*TEXTS, *PICTURES) and name not in NOT_SENT and path.is_file() and not path.is_symlink():
                yield path


def pack(folder: Path, scrub: Scrubber) -> Path:
    """Write ``folder``.tar.gz, which appears only when it is whole, and return it.

    Raises:
        OSError: it cannot be written.
    """
    target = folder.with_name(f"{folder.name}.tar.gz")
    partial = target.with_name(f"{target.name}.partial")
    try:
        with (
            partial.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for path in sent(folder):
                content = _content(path, scrub)
                entry = tarfile.TarInfo(f"gpu-report/{scrub(path.relative_to(folder).as_posix())}")
                entry.size = len(content)  # owner, group and time stay zero
                archive.addfile(entry, io.BytesIO(content))
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def _content(path: Path, scrub: Scrubber) -> bytes:
    if path.suffix in PICTURES:
        return path.read_bytes()
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LARGEST))
        return scrub(file.read().decode("utf-8", "replace")).encode()
