"""Read texts and their tokens, and compute a model's perplexity on a text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from planner.common.progress import Progress
from planner.evaluation.passes import evaluate_text
from planner.evaluation.reader import open_reader
from planner.evaluation.scores import windows
from planner.text.files import NO_TEXT
from planner.text.formats import read_documents
from planner.text.tokenizer import encode, encode_beginning, load_tokenizer, render
from vllm_moeq.format import UsageError

MAX_CHARACTERS = 1 << 25
"""Characters of all texts together that a model is asked to predict."""


def read_texts(path: Path, folder: Path) -> tuple[str, ...]:
    """Return the texts in a file; conversations are written by a model's chat template.

    Args:
        path: the file, see :func:`planner.text.formats.read_documents`.
        folder: the model's folder.

    Raises:
        MoeqError: no such file, damaged contents, nothing but blanks, or more than :data:`MAX_CHARACTERS`; a damaged
            tokenizer.
    """
    found: list[str] = []
    tokenizer, left = None, MAX_CHARACTERS
    for document in read_documents(path, MAX_CHARACTERS + 1):
        if document.text is None and tokenizer is None:
            tokenizer = load_tokenizer(folder)
        text = render(document, tokenizer)
        left -= len(text)
        if text.strip():
            found.append(text)
        if left < 0:
            raise UsageError(f"{path}: expected at most {MAX_CHARACTERS >> 20} Mi characters, found more")
    if not found:
        raise UsageError(f"{path}: {NO_TEXT}")
    return tuple(found)


def read_tokens(folder: Path, texts: Sequence[str], max_tokens: int | None, name: str) -> list[int]:
    """Return the tokens of some texts by a model's tokenizer.

    The special tokens that the tokenizer puts around a text are added to the first one; texts follow each other,
    separated by the end-of-text token if the model has one.

    Args:
        folder: the model's folder.
        texts: the texts.
        max_tokens: maximum number of tokens; None for all.
        name: name of the texts in messages.

    Raises:
        MoeqError: no tokenizer, or texts of fewer than two tokens.
    """
    tokenizer = load_tokenizer(folder)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for number, text in enumerate(texts):
        ids += end if number else []
        if max_tokens is None:
            ids += encode(tokenizer, text, name, special=number == 0)
            continue
        most = max_tokens + 1 - len(ids)  # one more, since the first may be left out
        ids += encode_beginning(tokenizer, text, name, most, special=number == 0)
        if len(ids) > max_tokens:
            break
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:  # a chat template has written it too
        ids = ids[1:]
    ids = ids[:max_tokens]
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
    tokens, targets = cut(read_tokens(folder, [text], max_tokens, "text"), window)
    reader = open_reader(folder, torch.device("cpu"))
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return evaluate_text(reader, None, tokens, targets, Path(temporary), progress).model.perplexity
    finally:
        reader.close()
