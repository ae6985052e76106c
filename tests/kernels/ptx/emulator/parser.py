"""PTX text to :class:`Kernel`: only what Triton writes, everything else is refused."""

from __future__ import annotations

import re
import struct
from bisect import bisect
from functools import lru_cache

from tests.kernels.ptx.emulator.instructions import (
    Address,
    Block,
    Float,
    Instruction,
    Integer,
    Kernel,
    Operand,
    Register,
    Symbol,
    UnsupportedError,
    Vector,
)

TOKEN = re.compile(
    r"\s*(?:(?P<place>\.loc\s[^\n]*)|(?P<open>\{)|(?P<close>\})|(?P<label>[$A-Za-z_][\w$]*):|(?P<statement>[^;]*);)"
)
PARAMETER = re.compile(r"\.param\s+\.(?:align\s+\d+\s+\.)?\w+\s+(?:.*\s)?(\w+)", re.S)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+([$\w]+)")
TABLE = re.compile(r"\.branchtargets([^;]*)")
GUARD = re.compile(r"@(!?)\s*(\S+)\s+")


def found(pattern: str, text: str) -> re.Match[str]:
    """Return the first match.

    Raises:
        UnsupportedError: there is none.
    """
    match = re.search(pattern, text, re.S)
    if match is None:
        raise UnsupportedError(f"a kernel without {pattern}")
    return match


def parts(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside of brackets."""
    result, depth, last = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == separator and depth == 0:
            result.append(text[last:index].strip())
            last = index + 1
    result.append(text[last:].strip())
    return [part for part in result if part]


@lru_cache(maxsize=64)
def parse(text: str) -> Kernel:
    """Read the kernel of a PTX module.

    Raises:
        UnsupportedError: the text has something that the emulator does not know.
    """
    code = re.sub(r"//[^\n]*", "", text)
    entry = found(r"\.visible\s+\.entry\s+\w+\s*\((.*?)\)", code)
    start = code.index("{", entry.end())
    names = [PARAMETER.fullmatch(part) for part in parts(entry[1])]
    if None in names:
        raise UnsupportedError(f"parameters {entry[1]}")
    body = Body(code, start + 1)
    return Kernel(
        found(r"\.target\s+(\w+)", code)[1],
        [name[1] for name in names if name],
        int(found(r"\.reqntid\s+(\d+)", code[entry.end() : start])[1]),
        body.registers,
        body.blocks,
        body.labels,
        body.tables,
        {match[2]: (int(match[3] or 0), int(match[1])) for match in SHARED.finditer(code)},
        text,
    )


class Body:
    """Reads the code between the outer braces.

    Args:
        code: the text without comments.
        start: the first character behind the brace.
    """

    def __init__(self, code: str, start: int) -> None:
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', code, re.M))
        self.targets = set(BRANCH.findall(code))
        for table in TABLE.findall(code):
            self.targets |= set(parts(table))
        self.registers: dict[str, str] = {}
        self.blocks = [Block(0)]
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.source = ""
        self.label = ""
        ends = [match.start() for match in re.finditer("\n", code)]
        at = start
        while self.scopes:
            token = TOKEN.match(code, at)
            if token is None or token.lastgroup is None:
                raise UnsupportedError(f"text {code[at : at + 40]!r}")
            at = token.end()
            inside = token[token.lastgroup]
            line = bisect(ends, token.start(token.lastgroup)) + 1
            getattr(self, "read_" + token.lastgroup)(inside, line)

    def read_place(self, text: str, _: int) -> None:
        """Note the Python line that the next instructions come from."""
        file, line = text.split()[1:3]
        self.source = f"{self.files.get(file, '?')}:{line}"

    def read_open(self, _text: str, _line: int) -> None:
        """Open a scope of registers."""
        self.scopes.append({})

    def read_close(self, _text: str, _line: int) -> None:
        """Close a scope; the last one is the kernel's."""
        self.scopes.pop()

    def read_label(self, name: str, _: int) -> None:
        """Begin a block if something jumps here."""
        self.label = name
        if name in self.targets:
            self._new_block()
            self.labels[name] = self.blocks[-1].index

    def read_statement(self, text: str, line: int) -> None:
        """Read a directive or an instruction."""
        text = " ".join(text.split())
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".branchtargets"):
            self.tables[self.label] = parts(text.removeprefix(".branchtargets"))
        elif text.startswith("."):
            if not text.startswith(".pragma"):
                raise UnsupportedError(text)
        elif text:
            instruction = self._instruction(text, line)
            self.blocks[-1].instructions.append(instruction)
            if instruction.ends_block:
                self._new_block()

    def _new_block(self) -> None:
        if self.blocks[-1].instructions:
            self.blocks.append(Block(len(self.blocks)))

    def _declare(self, text: str) -> None:
        kind, names = found(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for name in parts(names):
            if many := re.fullmatch(r"(%\w+)<(\d+)>", name):
                self.registers |= {f"{many[1]}{index}": kind for index in range(int(many[2]))}
            else:  # a snippet of inline assembly has registers of its own, each time
                unique = f"{name}#{len(self.registers)}"
                self.scopes[-1][name] = unique
                self.registers[unique] = kind

    def _instruction(self, text: str, line: int) -> Instruction:
        guard = None
        if match := GUARD.match(text):
            guard = (self._name(match[2]), bool(match[1]))
            text = text[match.end() :]
        op, _, rest = text.partition(" ")
        return Instruction(op, tuple(self._operand(part) for part in parts(rest)), guard, line, self.source)

    def _name(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{") and text.endswith("}"):
            return Vector(tuple(self._operand(part) for part in parts(text[1:-1])))
        if text.startswith("[") and text.endswith("]"):
            return self._address(text[1:-1].strip())
        if "|" in text:
            return Vector(tuple(self._operand(part) for part in parts(text, "|")))
        if (number := literal(text)) is not None:
            return number
        name = self._name(text)
        if name.startswith("%") or name in self.registers:
            return Register(name)
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise UnsupportedError(f"operand {text}")

    def _address(self, text: str) -> Address:
        match = re.fullmatch(r"([^\s,+]+)\s*(?:\+\s*(-?\w+))?", text)
        if match is None:
            raise UnsupportedError(f"address {text}")
        base = self._operand(match[1])
        if not isinstance(base, Register | Symbol | Integer):
            raise UnsupportedError(f"address {text}")
        return Address(base, int(match[2] or "0", 0))


def literal(text: str) -> Integer | Float | None:
    """Return a number of the text, or None if it is none."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Float(int(text[2:], 16), 4)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Float(int(text[2:], 16), 8)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Integer(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", text):
        return Float(int.from_bytes(struct.pack("<f", float(text)), "little"), 4)
    return None
