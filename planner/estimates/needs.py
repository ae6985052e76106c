"""What a command takes, for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Needs:
    """What a command takes.

    Attributes:
        written_bytes: of all files of its output.
        temporary_bytes: of files that it deletes at its end.
        ram_bytes: largest resident memory of its processes together, Python and its libraries included.
        device_bytes: memory of each GPU that it computes on; 0 on a CPU.
        seconds: from rates measured on this machine just now; 0 where they are not known.
    """

    written_bytes: int
    temporary_bytes: int
    ram_bytes: int
    device_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for ``--json``."""
        return asdict(self)
