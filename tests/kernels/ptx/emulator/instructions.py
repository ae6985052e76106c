"""PTX as data: operands, instructions, blocks, and a kernel of them."""

from __future__ import annotations

from dataclasses import dataclass, field


class UnsupportedError(Exception):
    """The emulator does not know this; it never guesses."""


@dataclass(frozen=True)
class Register:
    """A register, with its unique name."""

    name: str


@dataclass(frozen=True)
class Integer:
    """An integer in the text."""

    value: int


@dataclass(frozen=True)
class Float:
    """A floating-point number in the text, as its bits.

    Attributes:
        bits: the bit pattern.
        size: bytes.
    """

    bits: int
    size: int


@dataclass(frozen=True)
class Symbol:
    """A name that is no register: a parameter, shared memory, a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """A place in memory: a base and bytes added to it."""

    base: Register | Symbol | Integer
    offset: int


@dataclass(frozen=True)
class Vector:
    """Several operands in braces."""

    items: tuple[Operand, ...]


Operand = Register | Integer | Float | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        op: the opcode with its modifiers.
        args: the operands.
        guard: the predicate's register, and whether it is negated; None if there is none.
        line: the line of the text.
        source: the line of the Python function behind it, such as "tile.py:57"; empty if the text does not say.
    """

    op: str
    args: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    line: int
    source: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.op.partition(".")[0]

    @property
    def mods(self) -> list[str]:
        """The modifiers; the last one is usually the type."""
        return self.op.split(".")[1:]

    @property
    def is_barrier(self) -> bool:
        """Whether the whole thread block meets here."""
        return self.op.startswith(("bar.sync", "barrier.sync", "barrier.cta.sync"))

    @property
    def ends_block(self) -> bool:
        """Whether control may go elsewhere after it."""
        return self.is_barrier or self.name in ("bra", "brx", "ret", "exit", "trap")

    def __str__(self) -> str:
        return f"line {self.line} {self.op}" + (f" ({self.source})" if self.source else "")


@dataclass
class Block:
    """Instructions without a jump into or out of their middle."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Kernel:
    """A kernel's text, read.

    Attributes:
        target: the architecture.
        parameters: the names of the parameters.
        threads: threads per block.
        registers: each register's type without the dot.
        blocks: the code.
        labels: the block that begins at each label.
        tables: the labels of each table of branches.
        shared: size and alignment of each array in shared memory; the size 0 stands for dynamic memory.
        text: the PTX.
    """

    target: str
    parameters: list[str]
    threads: int
    registers: dict[str, str]
    blocks: list[Block]
    labels: dict[str, int]
    tables: dict[str, list[str]]
    shared: dict[str, tuple[int, int]]
    text: str
