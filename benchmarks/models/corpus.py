"""The text of the small models: Python sources of this machine, and a tokenizer for them."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.models.architectures import SHARED
from benchmarks.models.fit import SEQUENCE

END = "<|endoftext|>"
# Tests, tables and generated documentation are not code that a reader would write.
TESTS = {"test", "tests", "idle_test"}
CALIBRATION = ("idlelib", "lib2to3")  # code like the rest, kept for calibration: no model trains on it
SKIPPED = TESTS | {"site-packages", *CALIBRATION, "encodings", "pydoc_data", "ensurepip"}
LONGEST_FILE = 200_000  # longer ones are mostly generated tables
TOKENIZER_CHARACTERS = 30_000_000
DISTINCTIVE = 40
"""Characters of a line that is hardly written twice by chance."""


def read_sources() -> tuple[list[str], list[str]]:
    """Return (training texts, held-out texts); a file's side depends on its relative path only."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] < 12 else train).append(text)
    return train, held_out


def read_calibration() -> list[str]:
    """Return texts for calibration, which are neither in the training text nor in the held-out text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path for name in CALIBRATION for path in sorted((root / name).rglob("*.py")))
    return [path.read_text(encoding="utf-8") for path in found if not TESTS.intersection(path.parts)]


def distinctive(texts: list[str]) -> set[str]:
    """Return the lines of texts that are hardly written twice by chance."""
    return {line for text in texts for line in map(str.strip, text.splitlines()) if len(line) >= DISTINCTIVE}


def read_installed(characters: int) -> list[str]:
    """Return the sources of installed packages for training, spread over all packages where they are too many.

    None is held out: held-out texts are the standard library's, the same for all models. Packages have copies of files
    of the standard library; a file with more than a tenth of its distinctive lines in a text that is held out, or kept
    for calibration, is left out.
    """
    kept = distinctive(read_sources()[1] + read_calibration())
    root = Path(sysconfig.get_paths()["purelib"])
    found = {path.relative_to(root): path for path in root.rglob("*.py")}
    mixed = sorted(found, key=lambda relative: hashlib.sha256(relative.as_posix().encode()).digest())
    texts: list[str] = []
    total = 0
    for relative in mixed:
        if total >= characters:
            break
        if SKIPPED.intersection(relative.parts) or found[relative].stat().st_size > LONGEST_FILE:
            continue
        text = found[relative].read_text(encoding="utf-8", errors="replace")
        lines = distinctive([text])
        if len(lines & kept) * 10 > len(lines):
            continue
        texts.append(text)
        total += len(text)
    return texts


def limited(texts: list[str], characters: int) -> Iterator[str]:
    """Yield texts until there are enough characters."""
    for text in texts:
        if characters <= 0:
            return
        yield text
        characters -= len(text)


def train_tokenizer(texts: list[str], vocabulary: int = int(SHARED["vocab_size"])) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a model's vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(texts, TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=SEQUENCE)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one int64 token stream, an end token after each text."""
    parts = []
    for begin in range(0, len(texts), 1000):  # many at a time use all cores; all at once, too much memory
        for ids in tokenizer(texts[begin : begin + 1000])["input_ids"]:
            parts.append(torch.tensor([*ids, 0]))
    return torch.cat(parts)
