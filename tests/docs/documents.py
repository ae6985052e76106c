"""The commands of README.md and docs/: of blocks that are marked as shell, of indented blocks, and in sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
PROGRAMS = ("moeq", "python", "make", "pip", "vllm", "lm_eval")
"""What a line of an indented block begins with, if it is a command; Python and listings are indented too."""

SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(moeq [^`]+)`")
REDIRECTION = re.compile(r"\s(?:[12&]?>|&$).*")
SUBSTITUTION = re.compile(r"\$\([^()]*\)")
ASSIGNMENT = re.compile(r"[A-Z_]+=")
ELLIPSIS = "…"


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: the page, relative to the repository.
        text: the command as it stands there, in one line.
        variables: names of variables that are set for it.
        words: program and arguments; what a shell would work out is left out.
        cut: whether the page leaves something out, by an ellipsis.
        fenced: whether it stands in a block that is marked as shell.
    """

    page: str
    text: str
    variables: tuple[str, ...]
    words: tuple[str, ...]
    cut: bool
    fenced: bool

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def shell_blocks(page: str) -> list[str]:
    """Return the blocks of a page that a reader pastes into a shell."""
    return SHELL.findall((ROOT / page).read_text(encoding="utf-8"))


def _joined(text: str) -> list[str]:
    return re.sub(r"\s*\\\n\s*", " ", text).splitlines()


def _split(page: str, line: str, fenced: bool) -> Iterator[Command]:
    for text in line.split(" && "):
        words = shlex.split(REDIRECTION.sub("", SUBSTITUTION.sub("", text)), comments=True)
        variables = []
        while words and ASSIGNMENT.match(words[0]):
            variables.append(words.pop(0).partition("=")[0])
        if words:
            kept = tuple(word for word in words if word != ELLIPSIS)
            yield Command(page, text.strip(), tuple(variables), kept, ELLIPSIS in words, fenced)


def commands(page: str) -> list[Command]:
    """Return the commands of a page's blocks, each once, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [command for block in shell_blocks(page) for line in _joined(block) for command in _split(page, line, True)]
    for line in _joined(FENCED.sub("", text)):
        if line.startswith("    ") and re.match(
            rf"(?:[A-Z_]+=\S* )*(?:{'|'.join(PROGRAMS)}|benchmarks/\S+) ", line[4:]
        ):
            found += _split(page, line[4:], False)
    return list(dict.fromkeys(found))


def mentions(page: str) -> list[tuple[str, ...]]:
    """Return the words of the ``moeq`` commands in a page's sentences."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [tuple(found.split()) for found in INLINE.findall(text)]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    """Return the targets of a page's links and pictures."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)
