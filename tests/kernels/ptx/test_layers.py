"""Layers whose kernels run as PTX, against float64: every schedule, and the kernels broken on purpose."""

from __future__ import annotations

import pytest

from tests.kernels.ptx.cases import Case, Edit, Figures
from tests.kernels.ptx.process import Call
from tests.kernels.ptx.table import EVERY_RUN, cases
from tests.tiers import thorough
from vllm_moeq.kernels.triton.schedule import FEW, MANY

pytestmark = pytest.mark.compiler


def check(figures: Figures) -> None:
    assert not figures.problems


@pytest.mark.parametrize("case", EVERY_RUN, ids=str)
def test_every_schedule(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))


def test_every_schedule_is_there() -> None:
    assert [case.schedule for case in EVERY_RUN] == [*FEW, *MANY]


EDITS = [
    Edit("0x00070007", "0x000e000e"),  # the mask of a code
    Edit(r"shr\.b32 (\S+) (\S+), 6;", r"shr.b32 \1 \2, 5;"),  # the shift of a field
    Edit(r"@(%p\d+) st\.global", r"@!\1 st.global"),  # the guard of a store
    Edit(r"cp\.async\.wait_group\s+\d+;", ""),
    Edit(r"(cp\.async\.wait_group\s+[^;]*;(?:\s|\.loc[^\n]*|//[^\n]*)*)bar\.sync\s+0;", r"\1"),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_broken_kernels_are_caught(emulated: Call, edit: Edit) -> None:
    figures = emulated("cases.run", EVERY_RUN[2], edit)
    assert figures.outcome.changed
    assert figures.problems


@pytest.mark.parametrize("case", thorough(cases(), []), ids=str)
def test_widths_routings_and_splits(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))
