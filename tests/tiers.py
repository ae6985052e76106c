"""The tiers of tests: see docs/development.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough(values: Iterable[Any], every_run: Iterable[Any]) -> list[Any]:
    """Return a test's parameters; those that are not in ``every_run`` run in ``make test-all`` only."""
    usual = list(every_run)
    return [value if value in usual else pytest.param(value, marks=pytest.mark.full) for value in values]
