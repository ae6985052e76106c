"""Find a model, as a folder or by its name on the Hub, and its files besides the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planner.model.codecs import FILES
from vllm_moeq.format import CheckpointError, UsageError
from vllm_moeq.format.files import check_inside
from vllm_moeq.format.index import index_shards
from vllm_moeq.format.shards import INDEX_NAME, SINGLE_NAME

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Files that each hold a vocabulary: a folder without any of them has no tokenizer."""

COMPANIONS = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
"""Files beside config and weights that a server needs: they are downloaded, copied and pushed. No code, no weights."""

TEMPLATES = "additional_chat_templates"
"""A folder of further chat templates, ``NAME.jinja``."""

CARD = "README.md"
"""The model card, which names the licence; it is downloaded and not copied."""

MAX_COMPANION = 1 << 28
"""Bytes of one companion file."""


def companions(folder: Path) -> list[str]:
    """Return the names, relative to a model's folder, of its tokenizer, generation settings and chat templates.

    Raises:
        CheckpointError: one is no regular file of this folder or of the Hub's cache, or larger than
            :data:`MAX_COMPANION`.
    """
    check_inside(folder / TEMPLATES, folder)
    templates = sorted(path.name for path in (folder / TEMPLATES).glob("*.jinja"))
    names = [*COMPANIONS, *(f"{TEMPLATES}/{name}" for name in templates)]
    found = sorted(name for name in names if (folder / name).exists() or (folder / name).is_symlink())
    for name in found:
        path = folder / name
        check_inside(path, folder)
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a regular file")
        if path.stat().st_size > MAX_COMPANION:
            raise CheckpointError(
                f"{path}: expected at most {MAX_COMPANION >> 20} MiB, found {path.stat().st_size} bytes"
            )
    return found


def companion_bytes(folder: Path) -> int:
    """Return the bytes of a folder's companion files."""
    return sum((folder / name).stat().st_size for name in companions(folder))


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder has a vocabulary."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def resolve_model(model: str, weights: bool = True, revision: str | None = None, cache: str | None = None) -> Path:
    """Return the local folder of a model. A model given by its Hub name is downloaded first.

    Of the weights, only the shards that the index names are downloaded: repositories often hold them twice.

    Args:
        model: folder or Hub name.
        weights: whether to download the weights too. Without them, the folder has weights only if an earlier call
            downloaded them.
        revision: branch, tag or commit on the Hub; None is its main branch.
        cache: folder of the Hub's cache; None is the usual one.

    Raises:
        MoeqError: neither a folder nor a name in the Hub or its local cache; a damaged index.
    """
    path = Path(model)
    if model and path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(f"{model or 'MODEL'}: expected a model folder or a Hub name (owner/name), found neither")
    light = ["config.json", CARD, *FILES, *COMPANIONS, f"{TEMPLATES}/*.jinja"]
    if not weights:
        return _download(model, light, revision, cache)
    folder = _download(model, [*light, INDEX_NAME], revision, cache)
    index = folder / INDEX_NAME
    shards = sorted(set(index_shards(index).values())) if index.exists() else [SINGLE_NAME]
    return _download(model, shards, revision, cache)


def _download(model: str, names: Sequence[str], revision: str | None, cache: str | None) -> Path:
    """Download some files of a model and return its folder in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=list(names)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{model}: no such folder, and the Hub did not have it ({reason})") from None
