"""The folder that vLLM loads, checked once before its weights are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vllm_moeq.format import MoeqError, ShardSet, Summary, verify


@dataclass
class Checkpoint:
    """What ``--model`` names.

    Attributes:
        model: a folder, or a name on the Hub, whose files vLLM puts into a cache just before it loads them.
        revision: on the Hub.
        cache: ``--download-dir``, or None for the Hub's own.
    """

    model: str
    revision: str | None = None
    cache: str | None = None
    _summary: Summary | None = field(default=None, repr=False)

    def folder(self) -> Path | None:
        """Return the folder, or None while the Hub's files are not here."""
        if Path(self.model).is_dir():
            return Path(self.model)
        try:
            found = snapshot_download(self.model, revision=self.revision, cache_dir=self.cache, local_files_only=True)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None
        return Path(found)

    def check(self) -> Summary | None:
        """Check config.json, index and headers, once; the values of experts are checked while they load.

        Returns:
            What the checkpoint holds, or None while its files are not here.

        Raises:
            MoeqError: the first problem, naming file and tensor.
        """
        folder = self.folder()
        if self._summary is None and folder is not None:
            self._summary = verify(folder, values=False)
        return self._summary

    def place(self, name: str) -> str:
        """Return what a message calls a tensor: its file, where that is known, and its name."""
        folder = self.folder()
        try:
            if folder is not None:
                with ShardSet(folder) as shards:
                    return shards.place(name)
        except MoeqError:
            pass
        return f"tensor {name}"
