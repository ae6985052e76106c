"""A model's tokenizer: loaded, checked against the model's embeddings, and asked for tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from planner.common.install import require
from planner.text.documents import Document
from vllm_moeq.format import NESTED, ConfigError, MoeqError, UsageError, read_json
from vllm_moeq.format.files import read_bytes

OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, MoeqError)
"""Not errors of a tokenizer. Its panics are no ``Exception``, so everything else is caught."""


MAX_TOKENIZER_BYTES = 1 << 28
OTHER_FILES = "fast_tokenizer_files"
MARGIN = 256
"""Tokens before a cut that the cut may have changed."""

CHARACTERS_PER_TOKEN = 8
"""More than most texts have, so that one try is enough for them."""

MAX_TOKENS = 1 << 24
"""The largest number of a token. Vocabularies have up to a few hundred thousand."""


def _open(folder: Path) -> Any:
    """Return a model's tokenizer, if transformers can load it.

    Raises:
        MoeqError: it cannot, or is not installed.
    """
    require(f"{folder}: its tokenizer", ("transformers",), "hf")
    from transformers import AutoTokenizer

    _refuse_large_numbers(folder / "tokenizer.json")
    _refuse_other_files(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.get_vocab()
    except OURS:
        raise
    except BaseException as error:
        _refuse(f"{folder}: transformers cannot load its tokenizer", error)
    return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """Return a model's tokenizer.

    Raises:
        MoeqError: transformers cannot load one, or it has tokens for which the model has no embedding.
    """
    tokenizer = _open(folder)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    rows = _vocabulary_size(folder)
    token, number = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if rows is not None and number >= rows:
        raise ConfigError(
            f"{folder}: tokenizer: expected numbers below {rows}, the model's vocab_size, "
            f"found token {token!r:.80} with the number {number}; resize the model's embeddings, or remove the token"
        )
    return tokenizer


def encode(tokenizer: Any, text: str, where: str, special: bool = False) -> list[int]:
    """Return a text's tokens.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        where: the text's place, for messages.
        special: whether to add the special tokens that stand around a text.

    Raises:
        UsageError: the tokenizer fails.
    """
    try:
        found: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except OURS:
        raise
    except BaseException as error:
        _refuse(f"{where}: the model's tokenizer cannot read it", error)
    return found


def encode_beginning(tokenizer: Any, text: str, where: str, most: int, special: bool = False) -> list[int]:
    """Return a text's first tokens, and read only as much of its beginning as they need.

    A tokenizer takes some 200 bytes of memory per character, and a text of millions may be read for a few tokens. Where
    the text is cut, its last tokens may be others; :data:`MARGIN` tokens before the cut are therefore left out.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        where: the text's place, for messages.
        most: the largest number of tokens.
        special: see :func:`encode`.

    Raises:
        UsageError: the tokenizer fails.
    """
    characters = (most + MARGIN) * CHARACTERS_PER_TOKEN
    while characters < len(text):
        found = encode(tokenizer, text[:characters], where, special)
        if len(found) >= most + MARGIN:
            return found[:most]
        characters *= 4
    return encode(tokenizer, text, where, special)[:most]


def render(document: Document, tokenizer: Any) -> str:
    """Return a document's text; a conversation is written by the model's chat template.

    Raises:
        UsageError: there is no chat template, or it does not take the conversation.
    """
    if document.text is not None:
        return document.text
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{document.where}: a conversation needs the model's chat template, which {tokenizer.name_or_path} lacks; "
            "expected a field text"
        )
    try:
        rendered: str = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
    except OURS:
        raise
    except BaseException as error:
        _refuse(f"{document.where}: the model's chat template does not take the conversation", error)
    return rendered


def _refuse_large_numbers(path: Path) -> None:
    """Refuse token numbers up to which the tokenizer would fill the memory with a table.

    Raises:
        ConfigError: naming the token; or a file of more than :data:`MAX_TOKENIZER_BYTES`.
    """
    try:
        found = json.loads(read_bytes(path, MAX_TOKENIZER_BYTES)) if path.exists() else {}
        vocabulary, added = found["model"]["vocab"], found.get("added_tokens") or []
        pairs = [
            *(vocabulary.items() if isinstance(vocabulary, dict) else ()),
            *((it["content"], it["id"]) for it in added),
        ]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return  # transformers says what is wrong with it
    for token, number in pairs:
        if isinstance(number, int) and number > MAX_TOKENS:
            raise ConfigError(
                f"{path}: expected numbers up to {MAX_TOKENS}, found token {token!r:.80} with {number!r:.40}"
            )


def _refuse_other_files(path: Path) -> None:
    """Refuse settings that lead transformers to another file than tokenizer.json.

    Raises:
        ConfigError: naming the key.
    """
    found = read_json(path) if path.exists() else {}
    if isinstance(found, dict) and OTHER_FILES in found:
        raise ConfigError(f"{path}: {OTHER_FILES}: expected no such key, found {found[OTHER_FILES]!r:.80}")


def _refuse(what: str, error: BaseException) -> NoReturn:
    """Raise a tokenizer's error as one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    raise UsageError(f"{what} ({reason:.300})") from None


def _vocabulary_size(folder: Path) -> int | None:
    """Return the number of embeddings that config.json names, or None."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    for part in (config, config.get(NESTED)) if isinstance(config, dict) else ():
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if type(size) is int:
            return size
    return None
