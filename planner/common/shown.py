"""Show names and values that anybody may have chosen: no escapes reach a terminal, and nothing endless."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST = 2000
"""Characters of a line for people."""


def shown(text: object, most: int = LONGEST) -> str:
    """Return a text on one line, with unprintable characters escaped, and shortened in its middle where it is too long.

    Args:
        text: anything; line breaks become spaces.
        most: largest number of characters of the result.
    """
    line = " ".join(str(text).splitlines())
    if len(line) > 2 * most:  # what is left out need not be looked at
        line = f"{line[:most]}{line[-most:]}"
    line = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line)
    if len(line) <= most:
        return line
    half = (most - 3) // 2
    return f"{line[:half]} … {line[-half:]}"


def say(text: object) -> None:
    """Print a line of results; rich takes nothing in it for markup."""
    Console().print(shown(text), soft_wrap=True, markup=False, emoji=False)


def add_row(table: Table, *cells: str) -> None:
    """Add a row to a table; rich takes nothing in its cells for markup."""
    table.add_row(*(Text(shown(cell)) for cell in cells))
