"""Calibration text: files or named datasets, cut into token sequences of one length."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planner.model.source import SourceModel
from vllm_moeq.format import NESTED, ConfigError, UsageError

SEQUENCE = 2048
"""Number of tokens in a sequence by default, if the model can read as many."""

BYTES_PER_TOKEN = 16
"""Characters of text to read for each token wanted: several times what tokenizers need."""


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset on the Hub, at a fixed commit."""

    path: str
    config: str | None
    split: str
    column: str
    revision: str


DATASETS = {
    "wikitext2": Dataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", "b08601e04326c79dfdd32d625aee71d232d685c3"
    ),
    "c4": Dataset("allenai/c4", "en", "train", "text", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"),
}
"""Datasets that ``--data`` knows by name; any other dataset is ``owner/name[:config]@commit``."""

NAMED = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?@([0-9a-f]{40})")


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
        data: a text file, a JSON-lines file with a ``text`` field, a name in :data:`DATASETS`, or
            ``owner/name[:config]@commit``.
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
    for document in _limited(documents(data, budget), budget):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    available = len(ids) // length
    if available == 0:
        raise UsageError(f"--data {data}: expected at least {length} tokens (--seq-len), found {len(ids)}")
    windows = torch.tensor(ids[: available * length], dtype=torch.int64).reshape(available, length)
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:sequences].sort().values
    name = Path(data).name if Path(data).exists() else data
    return CalibrationText(windows[chosen], {"data": name, "seed": seed})


def documents(data: str, characters: int) -> Iterator[str]:
    """Yield the documents of a file or a dataset; a plain text is one document, of up to ``characters`` characters.

    Raises:
        MoeqError: there is no such file or dataset, or it has another format than its name says.
    """
    path = Path(data)
    if path.is_file():
        return _json_lines(path) if path.suffix in (".jsonl", ".ndjson") else _plain(path, characters)
    named = NAMED.fullmatch(data)
    if data in DATASETS:
        return _dataset(DATASETS[data])
    if named is not None:
        return _dataset(Dataset(named[1], named[2], "train", "text", named[3]))
    known = ", ".join(DATASETS)
    raise UsageError(
        f"--data: expected a text or JSON-lines file, one of {known}, or owner/name[:config]@<40-digit commit>, "
        f"found {data}"
    )


def _plain(path: Path, characters: int) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file.read(characters)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a UTF-8 text file ({error})") from None


def _json_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, f"{path}: line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a UTF-8 JSON-lines file ({error})") from None


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: expected a JSON object with a text field, found no JSON") from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected a JSON object with a text field, found {line.strip()[:60]!r}")
    return text


def _dataset(dataset: Dataset) -> Iterator[str]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError("--data: a named dataset needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(
            dataset.path, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
        for row in rows:
            if row[dataset.column].strip():
                yield row[dataset.column]
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"--data {dataset.path}@{dataset.revision[:8]}: cannot be read ({reason})") from None


def _limited(texts: Iterable[str], budget: int) -> Iterator[str]:
    """Yield texts, up to ``budget`` characters in total."""
    for text in texts:
        if budget <= 0:
            return
        yield text[:budget]
        budget -= len(text)


def load_tokenizer(folder: Path) -> Any:
    """Return a model's tokenizer.

    Raises:
        ConfigError: transformers cannot load one.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load its tokenizer ({error})") from None


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
