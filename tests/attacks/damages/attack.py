"""What is done to a checkpoint, and what the refusal has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.attacks.forge import TENSOR

PACKED, SCALE, ZERO = (f"{TENSOR}.weight_{suffix}" for suffix in ("packed", "scale", "zero"))
SHARD = "model-0000"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@dataclass(frozen=True)
class Attack:
    """One damage.

    Attributes:
        name: in a few words.
        change: does it to a folder.
        words: what the message has to hold: file, tensor or field, and what is wrong.
        foreign: vLLM and transformers read config.json before they know that it is ours, and fail or not in their own
            way; the check begins where they hand over.
        base: the fixture with the checkpoint that is damaged.
    """

    name: str
    change: Callable[[Path], None]
    words: tuple[str, ...]
    foreign: bool = False
    base: str = "quantized_mixtral"
