"""The tiers of tests: see docs/development.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(values: Iterable[Any], every_run: Iterable[Any]) -> list[Any]:
    """Return a test's values of one parameter; those that are not in ``every_run`` run in ``make test-all`` only."""
    return thorough_rows([(value,) for value in values], [(value,) for value in every_run])


def thorough_rows(rows: Iterable[tuple[Any, ...]], every_run: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the same of several parameters: a row has a value of each."""
    usual = list(every_run)
    return [pytest.param(*row, marks=() if row in usual else pytest.mark.full) for row in rows]
