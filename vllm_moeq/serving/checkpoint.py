"""The folder that vLLM loads; it is checked once before its weights are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vllm_moeq.completeness import verify_whole
from vllm_moeq.format import MoeqError, ShardSet, Summary


@dataclass
class Checkpoint:
    """The checkpoint that ``--model`` names.

    Attributes:
        model: a folder, or a name on the Hub, which vLLM downloads just before it loads the weights.
        revision: the revision on the Hub.
        cache: the cache folder, ``--download-dir``; None is the Hub's default.
    """

    model: str
    revision: str | None = None
    cache: str | None = None
    _summary: Summary | None = field(default=None, repr=False)

    def folder(self) -> Path | None:
        """Return the folder, or None if the Hub's files are not downloaded yet."""
        if Path(self.model).is_dir():
            return Path(self.model)
        try:
            found = snapshot_download(self.model, revision=self.revision, cache_dir=self.cache, local_files_only=True)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None
        return Path(found)

    def check(self) -> Summary | None:
        """Check config.json, index and headers, once; the experts' values are checked while they load.

        Returns:
            Counts and sizes, or None if the files are not downloaded yet.

        Raises:
            MoeqError: a check fails; the message names the file and the tensor.
        """
        folder = self.folder()
        if self._summary is None and folder is not None:
            self._summary = verify_whole(folder, values=False)
        return self._summary

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return one tensor, or None if the checkpoint has none of that name or its files are not here.

        Raises:
            CheckpointError: the checkpoint cannot be read.
        """
        folder = self.folder()
        if folder is None:
            return None
        with ShardSet(folder) as shards:
            return shards.load(name).clone() if name in shards.tensors else None

    def place(self, name: str) -> str:
        """Return the name of a tensor, with its file if that is known, for messages."""
        folder = self.folder()
        try:
            if folder is not None:
                with ShardSet(folder) as shards:
                    return shards.place(name)
        except MoeqError:
            pass
        return f"tensor {name}"
