"""What the sanitizer saw, by kind and place."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of findings."""

    WILD = "a global address that belongs to no argument"
    OUT_OF_BOUNDS = "a global access outside of the argument"
    MISALIGNED = "a misaligned global access"
    UNWRITTEN = "a read of global memory that nothing wrote"
    SHARED_OUT_OF_BOUNDS = "a shared access out of bounds"
    SHARED_MISALIGNED = "a misaligned shared access"
    NEVER_WRITTEN = "a read of shared memory that nothing wrote"
    NOT_WAITED_FOR = "a read of shared memory whose asynchronous copy was not waited for"
    COPY_IN_FLIGHT = "a write over an asynchronous copy in flight"
    READ_AFTER_WRITE = "a read after another warp's write without a barrier between"
    WRITE_AFTER_READ = "a write after another warp's read without a barrier between"
    WRITE_AFTER_WRITE = "writes of two warps without a barrier between"
    ONE_ADDRESS = "different values written to one shared address by one instruction"
    BARRIERS = "threads of a block that meet at different barriers"
    NOT_FENCED = "a read by wgmma of what no fence.proxy.async followed"
    WGMMA_OPERAND = "a register of a wgmma written after wgmma.fence"
    WGMMA_IN_FLIGHT = "a register of a wgmma touched before its wait"


class Findings:
    """Findings, counted, with the first example of each kind and place."""

    def __init__(self) -> None:
        self.count: Counter[tuple[Kind, str]] = Counter()
        self.example: dict[tuple[Kind, str], str] = {}

    def add(self, kind: Kind, where: str, detail: str, number: int = 1) -> None:
        """Add one finding of ``number`` threads."""
        self.count[kind, where] += number
        self.example.setdefault((kind, where), detail)

    def clear(self) -> None:
        """Forget all findings."""
        self.count.clear()
        self.example.clear()

    def merge(self, other: Findings, name: str) -> None:
        """Add the findings of a launch under its kernel's name."""
        for (kind, where), number in other.count.items():
            self.add(kind, f"{name} {where}", other.example[kind, where], number)

    @property
    def kinds(self) -> set[Kind]:
        """The kinds that were found."""
        return {kind for kind, _ in self.count}

    def lines(self) -> list[str]:
        """Return a line for each kind and place."""
        return [
            f"{kind}, {number} times, {where}: {self.example[kind, where]}"
            for (kind, where), number in self.count.items()
        ]
