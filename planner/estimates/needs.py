"""The resources that a command needs, for people and for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Needs:
    """The resources that a command needs.

    Attributes:
        written_bytes: bytes of all output files.
        temporary_bytes: bytes of temporary files; the command deletes them at its end.
        ram_bytes: peak resident memory of all its processes together, Python and its libraries included.
        device_bytes: memory of each GPU that the command uses; 0 on a CPU.
        seconds: duration, estimated from rates just measured on this machine; 0 if unknown.
    """

    written_bytes: int
    temporary_bytes: int
    ram_bytes: int
    device_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for ``--json``."""
        return asdict(self)


def largest(found: Sequence[Needs]) -> Needs:
    """Return the most that any of several ways needs of each resource, where it is not known which one is taken."""
    return Needs(**{item.name: max(getattr(needs, item.name) for needs in found) for item in fields(Needs)})
