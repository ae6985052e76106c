"""What came of emulated launches."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kernels.ptx.emulator.findings import Kind


@dataclass(frozen=True)
class Outcome:
    """What came of one emulated call.

    Attributes:
        error: the difference to the expected result.
        kinds: the kinds of findings.
        lines: a line for each finding.
        launches: the kernel and the PTX of each launch.
        changed: whether the PTX was changed on purpose.
    """

    error: float
    kinds: set[Kind]
    lines: list[str]
    launches: list[tuple[str, str]]
    changed: bool

    @property
    def text(self) -> str:
        """The PTX of all launches."""
        return "\n".join(text for _, text in self.launches)
