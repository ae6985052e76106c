"""Run a whole model, loaded by transformers, over a text. The experts of a moeq checkpoint stay packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from planner.calibration.reading.decoder import ROWS, compute_dtype
from planner.calibration.reading.hidden import file_tensor
from planner.calibration.reading.replay import StoredOutputs
from planner.calibration.reading.routed import batches
from planner.common.install import require
from planner.common.progress import Progress
from planner.output.files import sync, write_json
from vllm_moeq.completeness import cannot_load
from vllm_moeq.format import read_json


class WholeReader:
    """See :class:`planner.evaluation.reader.Reader`.

    :meth:`head` runs the model's own code behind its base, such as a bias, a scale or a cap of the logits.

    Raises:
        MoeqError: transformers does not know the model.
    """

    def __init__(self, folder: Path, device: torch.device, batch: int | None = None) -> None:
        require(str(folder), ("transformers",), "eval")
        from transformers import AutoConfig

        self.folder = folder
        try:
            text = AutoConfig.from_pretrained(folder).get_text_config()
        except (OSError, ValueError) as error:
            raise cannot_load(folder, error) from None
        self.vocabulary, self._hidden = int(text.vocab_size), int(text.hidden_size)
        self._device, self._dtype, self._batch = device, compute_dtype(device), batch
        self.state_bytes = self._hidden * self._dtype.itemsize
        self._model: Any = None
        self._base: torch.nn.Module | None = None
        self._name = ""

    @torch.no_grad()
    def read(self, tokens: torch.Tensor, folder: Path, progress: Progress, what: str) -> torch.Tensor:
        """See :class:`planner.evaluation.reader.Reader`. Continue a killed run after its last finished batch."""
        folder.mkdir(parents=True, exist_ok=True)
        path, note = folder / "states.bin", folder / "states.json"
        states = file_tensor(path, (*tokens.shape, self._hidden), self._dtype)
        done = int(read_json(note)["windows"]) if note.is_file() else 0
        base = self._load()
        rows = ROWS if self._batch is None else self._batch * tokens.shape[1]
        for begin, part in progress.track(list(batches(tokens[done:], rows)), what):
            end = done + begin + len(part)
            found = base(input_ids=part.to(self._device), use_cache=False).last_hidden_state
            states[done + begin : end] = found.to(states.device)
            sync(path)
            write_json(note, {"windows": end})
        return states

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """See :class:`planner.evaluation.reader.Reader`."""
        if self._model is None:
            self._load()
        replaying = StoredOutputs()
        setattr(self._model, self._name, replaying)

        def logits(states: torch.Tensor) -> torch.Tensor:
            replaying.states = states[None].to(self._device, self._dtype)
            tokens = torch.zeros((1, len(states)), dtype=torch.int64, device=self._device)
            found: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits[0]
            return found.float()

        try:
            yield logits
        finally:
            setattr(self._model, self._name, self._base or replaying)

    def release(self) -> None:
        """See :class:`planner.evaluation.reader.Reader`."""
        if self._base is not None:
            setattr(self._model, self._name, StoredOutputs())
        self._base = None

    def close(self) -> None:
        """See :class:`planner.evaluation.reader.Reader`."""
        self._model = self._base = None

    def _load(self) -> torch.nn.Module:
        """Return the base model; load it if it is not in memory."""
        if self._base is None:
            self._model = load_whole(self.folder, self._device, self._dtype)
            # base_model and get_decoder() are wrong for Llama-4.
            embedding = self._model.get_input_embeddings()
            children = self._model.named_children()
            self._name, self._base = next(it for it in children if any(part is embedding for part in it[1].modules()))
        return self._base


def load_whole(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return transformers' causal language model of a folder, quantized by moeq or not.

    Raises:
        MoeqError: a damaged checkpoint, a model that transformers cannot load, missing packages.
    """
    require(str(folder), ("transformers", "accelerate"), "eval")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import vllm_moeq.hf  # noqa: F401  (registers the method)

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=str(device)).eval()
    except (OSError, ValueError) as error:
        raise cannot_load(folder, error) from None
