"""Read texts and their tokens, and compute a model's perplexity on a text."""

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
    """Return a text's tokens by a model's tokenizer, with the special tokens that it puts before a text.

    Args:
        folder: the model's folder.
        text: the text.
        max_tokens: maximum number of tokens; None for all.
        name: name of the text in messages.

    Raises:
        MoeqError: no tokenizer, or a text of fewer than two tokens.
    """
    ids: list[int] = load_tokenizer(folder)(text, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise UsageError(f"{name}: expected a text of at least two tokens, found {len(ids)}")
    return ids


def cut(ids: list[int], window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows as :func:`windows` does, but shorten the window to the text."""
    return windows(ids, min(window, len(ids) - 1))


def perplexity(folder: Path, text: str, progress: Progress, window: int = 512, max_tokens: int | None = None) -> float:
    """Return exp of the mean negative log-likelihood per token, over consecutive windows.

    Args:
        folder: a Hugging Face folder, quantized by moeq or not.
        text: the text to predict.
        progress: shows the progress.
        window: tokens of context; in each window, a token is predicted from the tokens before it.
        max_tokens: maximum number of tokens, from the text's begin; None for all.

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
