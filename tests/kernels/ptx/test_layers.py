"""Layers whose kernels run as PTX, against float64: every schedule, and the kernels broken on purpose."""

from __future__ import annotations

import pytest

from tests.kernels.ptx.cases import Case, Edit, Figures
from tests.kernels.ptx.process import Call
from tests.kernels.ptx.table import ACTIVATIONS, EVERY_RUN, TRELLISES, WIDE, cases
from tests.tiers import thorough
from vllm_moeq.kernels.triton.schedule import FEW, MANY

pytestmark = pytest.mark.compiler


def check(figures: Figures) -> None:
    assert not figures.problems


@pytest.mark.parametrize("case", EVERY_RUN, ids=str)
def test_every_schedule(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_slices_share_the_blocks_of_the_inputs(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))


@pytest.mark.parametrize("case", TRELLISES, ids=str)
def test_trellises_and_rotations(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_other_activations_and_biases(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))


def test_every_schedule_is_there() -> None:
    assert [case.schedule for case in EVERY_RUN] == [*FEW, *MANY]


SORTED = next(case for case in EVERY_RUN if case.schedule == MANY[0])
EDITS = [
    Edit("0x00380038", "0x00700070"),  # the mask of a code
    Edit(r"shr\.b32 (\S+) (\S+), 6;", r"shr.b32 \1 \2, 5;"),  # the shift of a field
    Edit(r"@(%p\d+) st\.global", r"@!\1 st.global"),  # the guard of a store
    Edit(r"cp\.async\.wait_group\s+\d+;", ""),
    Edit(r"(cp\.async\.wait_group\s+[^;]*;(?:\s|\.loc[^\n]*|//[^\n]*)*)bar\.sync\s+0;", r"\1"),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_broken_kernels_are_caught(emulated: Call, edit: Edit) -> None:
    figures = emulated("cases.run", SORTED, edit)
    assert figures.outcome.changed
    assert figures.problems


FEW_EDITS = [
    Edit(r"shr\.b32 t, (\S+), 9;", r"shr.b32 t, \1, 8;"),  # the shift of a part of the codes
    Edit(r"setp\.lt\.s32", "setp.gt.s32"),  # whether a block is there, or an expert
]


@pytest.mark.parametrize("edit", FEW_EDITS, ids=str)
def test_broken_kernels_for_few_tokens_are_caught(emulated: Call, edit: Edit) -> None:
    case = next(case for case in EVERY_RUN if case.schedule == FEW[-1])
    figures = emulated("cases.run", case, edit)
    assert figures.outcome.changed
    assert figures.problems


RING_EDITS = [
    Edit(r"shr\.b32 t, t, (\d+);", r"shr.b32 t, t, 0;"),  # the place of a state
    Edit("0x3531", "0x3135"),  # which byte belongs to which code
    Edit("0x5410", "0x7632"),  # which word a state begins in
    Edit("0x83dcd12d", "0x83dcd12b"),
]


@pytest.mark.parametrize("edit", RING_EDITS, ids=str)
def test_broken_trellises_are_caught(emulated: Call, edit: Edit) -> None:
    figures = emulated("cases.run", TRELLISES[0], edit)
    assert figures.outcome.changed
    assert figures.problems


@pytest.mark.parametrize("case", thorough(cases(), []), ids=str)
def test_widths_routings_and_splits(emulated: Call, case: Case) -> None:
    check(emulated("cases.run", case))
