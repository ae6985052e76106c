"""A browser, and a report to look at in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.reporting.page import render
from tests.conftest import run_here
from tests.paths import MIXTRAL
from tests.planner.reporting.browser import BROWSER, Page, open_browser
from tests.planner.reporting.synthetic import EVALUATIONS, synthetic


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert BROWSER is not None
    with open_browser(BROWSER, tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the shipped Mixtral, evaluated."""
    folder = tmp_path_factory.mktemp("seen") / "mixtral-2.5bit"
    flags = ("--avg-bits", 2.5, "--bits", "1,2,3", "--zeta", 1.3, "--quantizer", "rtn")
    run_here("quantize", MIXTRAL, *flags, "-o", folder)
    EVALUATIONS.write(folder)
    run_here("report", folder, "--no-png")
    return folder / "report.html"


@pytest.fixture(scope="session")
def large_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with 48 layers of 128 experts."""
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(render(*synthetic(48, 128)))
    return path
