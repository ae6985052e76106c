"""Calibration text: files or named datasets, cut into token sequences of one length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.model.source import SourceModel
from planner.text.files import NO_TEXT
from planner.text.sources import documents
from planner.text.tokenizer import encode, load_tokenizer, render
from vllm_moeq.format import NESTED, UsageError

SEQUENCE = 2048
"""Number of tokens in a sequence by default, if the model can read as many."""

BYTES_PER_TOKEN = 16
"""Characters of text to read for each token wanted: several times what tokenizers need."""


@dataclass(frozen=True)
class CalibrationText:
    """Token sequences and their source.

    Attributes:
        tokens: int64 [sequences, length].
        source: name of the file or dataset (with its commit), and the seed.
    """

    tokens: torch.Tensor
    source: dict[str, Any]

    def fingerprint(self) -> str:
        """Return the SHA-256 digest of the tokens and their shape."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()


def calibration_text(folder: Path, data: str, sequences: int, length: int, seed: int) -> CalibrationText:
    """Tokenize text with a model's tokenizer and draw sequences that do not overlap.

    Documents follow each other, separated by the end-of-text token if the model has one.

    Args:
        folder: model folder with a tokenizer.
        data: a text file or a dataset; see :func:`planner.text.sources.documents`.
        sequences: number of sequences; fewer if the text is short.
        length: number of tokens in each.
        seed: seed of the draw.

    Raises:
        MoeqError: the file is missing or no text, the model has no tokenizer, or the text is shorter than one sequence.
    """
    tokenizer = load_tokenizer(folder)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    budget = sequences * length * BYTES_PER_TOKEN
    ids: list[int] = []
    empty = True
    for document in documents(data, budget):
        text = render(document, tokenizer)[:budget]
        ids += encode(tokenizer, text, document.where) + end
        budget -= len(text)
        empty = empty and not text.strip()
        if budget <= 0:
            break
    if empty:
        raise UsageError(f"--data {data}: {NO_TEXT}")
    available = len(ids) // length
    if available == 0:
        raise UsageError(f"--data {data}: expected at least {length} tokens (--seq-len), found {len(ids)}")
    windows = torch.tensor(ids[: available * length], dtype=torch.int64).reshape(available, length)
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:sequences].sort().values
    name = Path(data).name if Path(data).exists() else data
    return CalibrationText(windows[chosen], {"data": name, "seed": seed})


def shortage(text: CalibrationText, wanted: int) -> str | None:
    """Return a note if a text holds fewer sequences than wanted, else None."""
    found, length = text.tokens.shape
    if found >= wanted:
        return None
    return (
        f"note: {text.source['data']} holds {found} sequences of {length} tokens, {wanted} were asked for; "
        "a longer text or a shorter --seq-len gives more"
    )


def longest_text(model: SourceModel) -> int:
    """Return the number of tokens that a model can read, or :data:`SEQUENCE` if its config does not say."""
    for part in (model.config, model.config.get(NESTED)):
        longest = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if type(longest) is int and longest > 0:
            return longest
    return SEQUENCE


def calibration_facts(text: CalibrationText, device: torch.device) -> dict[str, Any]:
    """Return the facts about the text that go into reports and into a run's fingerprint."""
    sequences, length = text.tokens.shape
    return {
        **text.source,
        "sequences": sequences,
        "seq_len": length,
        "tokens_sha256": text.fingerprint(),
        "device": device.type,
    }
