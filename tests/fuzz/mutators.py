"""Changes that keep JSON valid and headers of the right length, which changed bytes alone rarely are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, 2, 3, 5, 16, 32, 128, -1, 1 << 31, 1 << 63, 1 << 64, 10**400, 1.5, float("nan"), float("inf"),
    "", "a", "moeq", "grid", "trellis", "\x1b[31m", "../a", "re:.*", "x" * 600, [], {},
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 5, 8, 16, 32, -1, 1 << 31, 1 << 63, 1 << 64, 1.5)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key or index) of everything below a parsed JSON value."""
    if not isinstance(value, dict | list):
        return []
    own = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    return own + [place for container, key in own for place in _places(container[key])]


def mutate_json(data: bytes, generator: random.Random) -> bytes:
    """Replace, remove, move or repeat one value of a JSON text."""
    try:
        parsed = json.loads(data)
        container, key = generator.choice(places := _places(parsed))
        kind = generator.randrange(5)
        if kind == 0:
            container[key] = generator.choice(VALUES)
        elif kind == 1:
            other, place = generator.choice(places)
            container[key] = json.loads(json.dumps(other[place]))
        elif kind == 2:
            del container[key]
        elif isinstance(container, dict):
            container[generator.choice(("a", "a.b", "odp", "experts", "\x1b", "(a+)+$"))] = container[key]
        else:
            container += container * generator.choice((1, 1, 1, 100))
        return json.dumps(parsed).encode()
    except (ValueError, IndexError, RecursionError):
        return data


def mutate_header(data: bytes, generator: random.Random) -> bytes:
    """Change one value of a shard's header and write the header with its right length."""
    index, separator, shard = data.partition(b"\x00")
    size = int.from_bytes(shard[:8], "little")
    try:
        header = json.loads(shard[8 : 8 + size])
        entry = header[generator.choice(sorted(header))]
        field = generator.choice(("dtype", "shape", "data_offsets", "name"))
        number = generator.choice(NUMBERS)
        if field == "name":
            header[generator.choice(("a", "b", "", "\x1b[31m", "x" * 600, "__metadata__"))] = entry
        elif field == "dtype":
            entry[field] = generator.choice(("F64", "F32", "F16", "I8", "BOOL", "F8_E4M3", "F4", "U64", "X", 1))
        elif field == "shape" and generator.random() < 0.3:
            entry[field] = entry[field] + [number] * generator.choice((1, 2, 9, 70))
        else:
            entry[field][generator.randrange(len(entry[field]))] = number
        changed = json.dumps(header).encode()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return data
    return index + separator + len(changed).to_bytes(8, "little") + changed + shard[8 + size :]


def mutate_experts(data: bytes, generator: random.Random) -> bytes:
    """Change a config, or the header of the shard behind it."""
    if generator.random() < 0.5:
        return mutate_header(data, generator)
    config, separator, shard = data.partition(b"\x00")
    return mutate_json(config, generator) + separator + shard


MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "schema": mutate_json,
    "headers": mutate_header,
    "experts": mutate_experts,
    "tokenizers": mutate_json,
}
"""By target, where bytes are not enough."""
