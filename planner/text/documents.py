"""Documents, and how a row of JSON or of a table becomes one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_moeq.format import UsageError

Message = dict[str, str]
"""A message of a conversation: ``role`` and ``content``."""

CHATS = ("messages", "conversations")
"""Fields that hold a conversation."""

FIELDS = ("text", *CHATS)
"""Fields of a row that make a document; the first one present counts."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of ShareGPT's conversations → roles of chat templates."""


@dataclass(frozen=True)
class Document:
    """One text, or one conversation that a chat template turns into text.

    Attributes:
        where: file and line, for messages about it.
        text: the text, or None.
        messages: the conversation, if there is no text.
    """

    where: str
    text: str | None = None
    messages: tuple[Message, ...] = ()


def document_of(row: Any, where: str) -> Document:
    """Return the document in a row.

    Args:
        row: an object with one of :data:`FIELDS`, or a string, which is a text.
        where: the row's place, for messages.

    Raises:
        UsageError: another value, or half of a surrogate pair in a text.
    """
    if isinstance(row, str):
        return Document(where, _whole(row, where))
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected an object with a field {' or '.join(FIELDS)}, found {row!r:.60}")
    for field in FIELDS:
        value = row.get(field)
        if field in CHATS and isinstance(value, list):
            return Document(where, messages=tuple(_message(item, where) for item in value))
        if field not in CHATS and isinstance(value, str):
            return Document(where, _whole(value, where))
    values = [f"{field}: {row[field]!r:.60}" for field in FIELDS if field in row]
    found = values[0] if values else f"the fields {list(row)!r:.80}"
    raise UsageError(f"{where}: expected a field text, or {' or '.join(CHATS)} with a conversation, found {found}")


def digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 digest of some texts; of a single one it is the digest of its bytes."""
    return hashlib.sha256("\x1e".join(texts).encode()).hexdigest()


def _message(item: Any, where: str) -> Message:
    """Return a message of a conversation: OpenAI's keys, or ShareGPT's ``from`` and ``value``."""
    found = item if isinstance(item, Mapping) else {}
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise UsageError(f"{where}: expected messages with role and content, found {item!r:.60}")
    return {"role": ROLES.get(role, role), "content": _whole(content, where)}


def _whole(text: str, where: str) -> str:
    """Refuse half of a surrogate pair: JSON can write it, and no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{where}: expected text, found half of a surrogate pair, {found}") from None
    return text
