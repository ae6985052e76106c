"""Texts and their tokens; a model's perplexity on one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from planner.calibration.reading.text import load_tokenizer
from planner.common.progress import Progress
from planner.evaluation.passes import evaluate_text
from planner.evaluation.reader import open_reader
from planner.evaluation.scores import windows
from vllm_moeq.format import UsageError


def read_text(path: Path) -> str:
    """Return a UTF-8 text file's contents.

    Raises:
        UsageError: no such file, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a UTF-8 text file ({error})") from None


def read_tokens(folder: Path, text: str, max_tokens: int | None, name: str) -> list[int]:
    """Return a text's tokens by a model's tokenizer, with what that puts before every text.

    Args:
        folder: the model's.
        text: the text.
        max_tokens: how many to return at most.
        name: what a message calls the text.

    Raises:
        MoeqError: no tokenizer, or a text of fewer than two tokens.
    """
    ids: list[int] = load_tokenizer(folder)(text, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise UsageError(f"{name}: expected a text of at least two tokens, found {len(ids)}")
    return ids


def cut(ids: list[int], window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows as :func:`windows` does, none longer than the text."""
    return windows(ids, min(window, len(ids) - 1))


def perplexity(folder: Path, text: str, progress: Progress, window: int = 512, max_tokens: int | None = None) -> float:
    """Return exp of the mean negative log-likelihood per token, over consecutive windows.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        text: the text to predict.
        progress: where progress is shown.
        window: tokens of context; each window predicts all its tokens from those before it.
        max_tokens: use only the first so many tokens.

    Raises:
        MoeqError: a damaged checkpoint, or a text of fewer than two tokens.
    """
    tokens, targets = cut(read_tokens(folder, text, max_tokens, "text"), window)
    reader = open_reader(folder, torch.device("cpu"))
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return evaluate_text(reader, None, tokens, targets, Path(temporary), progress).model.perplexity
    finally:
        reader.close()
