"""Find a model, as a folder or by its name on the Hub, and its files besides the weights."""

from __future__ import annotations

from pathlib import Path

from vllm_moeq.format import UsageError

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files beside the weights that a server needs."""

NEEDED = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "README.md"]
"""Globs of the files to download; README.md, the model card, names the licence."""

LIGHT = ["config.json", "tokenizer*", "special_tokens_map.json", "generation_config.json", "*.txt"]
"""Globs of the files that a dry run downloads: config and tokenizer, without weights and their index."""


def companions(folder: Path) -> list[Path]:
    """Return the paths of a model folder's tokenizer, generation settings and chat template."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def resolve_model(model: str, weights: bool = True) -> Path:
    """Return the local folder of a model. A model given by its Hub name is downloaded first.

    Args:
        model: folder or Hub name.
        weights: whether to download the weights too. Without them, the folder has weights only if an earlier call
            downloaded them.

    Raises:
        UsageError: neither a folder nor a name in the Hub or its local cache.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(f"{model}: expected a model folder or a Hub name (owner/name), found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=NEEDED if weights else LIGHT))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{model}: no such folder, and the Hub did not have it ({reason})") from None
