"""Refuse damaged files beside the weights, which servers and transformers would pass over without a word."""

from __future__ import annotations

import os
from pathlib import Path

from planner.model.hub import TEMPLATES, TOKENIZERS, companions
from vllm_moeq.format import ConfigError, read_json
from vllm_moeq.format.files import open_regular, read_bytes

MAX_TEXT = 1 << 26
"""Bytes of a chat template or a list of merges."""

TEXTS = (".jinja", ".txt")


def check_companions(folder: Path) -> None:
    """Check that a model's generation settings, tokenizer settings and chat templates can be read.

    Vocabularies are only opened: transformers reads them when they are needed.

    Raises:
        ConfigError: a file that cannot be read, a JSON file that holds no object, or a text that is no UTF-8; the
            message names the file.
        CheckpointError: see :func:`planner.model.hub.companions`.
    """
    for name in _names(folder):
        path = folder / name
        if name.endswith(TEXTS):
            try:
                read_bytes(path, MAX_TEXT).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}: expected UTF-8, found a byte 0x{error.object[error.start]:02x}") from None
        elif name.endswith(".json") and name not in TOKENIZERS:
            found = read_json(path)
            if not isinstance(found, dict):
                raise ConfigError(f"{path}: expected a JSON object, found {found!r:.60}")
        else:
            open_regular(path).close()


def _names(folder: Path) -> list[str]:
    """Return the names of a folder's companions; a folder of templates that cannot be listed is not an empty one."""
    try:
        if (folder / TEMPLATES).is_dir():
            os.listdir(folder / TEMPLATES)
        return companions(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot read ({error.strerror})") from None
