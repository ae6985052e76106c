"""Keep transformers from importing installed packages that a command has no use for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

HEAVY = ("hqq", "sklearn")
"""Packages that transformers imports with its first model where they are installed: 180 MB and a second or two. It
needs them for speculative decoding and for models in HQQ's own format."""

UNRUN = ("scipy", "triton")
"""Packages that torch's compiler and transformers' losses import besides: 100 MB. A command that looks at a model's
class and never runs it has no use for them."""


@contextmanager
def without(names: tuple[str, ...] = HEAVY) -> Iterator[None]:
    """Let packages that are not imported yet look as if they were not installed, until the block ends."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's way to say so
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
