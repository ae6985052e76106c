"""Read a long JSON object of an untrusted file entry by entry, so that no more than one value is in memory at a time.

An index and a header have some hundred thousand entries, and parsed as a whole each takes several objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from typing import Any

from vllm_moeq.format.files import is_deep, unique

BLANK = frozenset(" \t\n\r")
BLANKS = re.compile(r"[ \t\n\r]*")
COMMA = re.compile(r",[ \t\n\r]*")
MAX_KEY = 1 << 16
"""Characters of a key."""
PLAIN_KEY = re.compile(r'"([^"\\\x00-\x1f]{0,4096})"[ \t\n\r]*:[ \t\n\r]*')
"""A key without escapes, and all before its value: nearly every key is one, and this takes half the time."""


class Walk:
    """A position in JSON text. Reading moves it past what was read.

    Args:
        text: the whole text.

    Raises:
        ValueError: by every method, if the text is not valid JSON; json.JSONDecodeError is one.
        RecursionError: by every method, if a value has too many levels.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=unique)
        self._skip(0)

    def keys(self, known: Container[str]) -> Iterator[str]:
        """Yield the keys of the object that begins here.

        Args:
            known: where the caller keeps the keys that it was given; a key that is among them stands twice.

        The caller reads the value behind a key before it asks for the next.
        """
        self._expect("{")
        more = not self.begins("}")
        while more:
            key = self._key()
            if key in known:
                raise ValueError(f"the key {key!r:.80} stands twice in one object")
            yield key
            if more := (comma := COMMA.match(self._text, self._at)) is not None:
                self._at = comma.end()
        self._expect("}")

    def _key(self) -> str:
        if (plain := PLAIN_KEY.match(self._text, self._at)) is not None:
            self._at = plain.end()
            return plain[1]
        if not self.begins('"'):
            raise self._error("expected a key in double quotes")
        key: str = self.short_value(MAX_KEY)
        self._expect(":")
        return key

    def begins(self, mark: str) -> bool:
        """Tell whether the text goes on with a character; the position stays."""
        return self._text.startswith(mark, self._at)

    def value(self) -> Any:
        """Return the value that begins here."""
        found, end = self._decoder.raw_decode(self._text, self._at)
        if isinstance(found, dict | list) and is_deep(found):
            raise RecursionError
        self._skip(end)
        return found

    def short_value(self, most: int) -> Any:
        """Return the value that begins here, which may have so many characters; no others are looked at."""
        part = self._text[self._at : self._at + most]
        try:
            found, end = self._decoder.raw_decode(part)
        except ValueError as error:
            if len(part) < most or "stands twice" in str(error):
                raise
            raise ValueError(f"expected values of at most {most} characters") from None
        self._skip(self._at + end)
        return found

    def end(self) -> None:
        """Require that no more text follows."""
        if self._at != len(self._text):
            raise self._error("expected no more text")

    def _expect(self, mark: str) -> None:
        if not self.begins(mark):
            raise self._error(f"expected {mark!r}")
        self._skip(self._at + 1)

    def _skip(self, at: int) -> None:
        if self._text[at : at + 1] in BLANK:
            at = BLANKS.match(self._text, at).end()  # type: ignore[union-attr]  # it matches the empty text
        self._at = at

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)
