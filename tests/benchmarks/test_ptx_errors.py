"""The table of errors of the kernels' PTX; what is in it is tested in ``tests/kernels/ptx``."""

from __future__ import annotations

from benchmarks.kernels.ptx_errors import HEADER, row, wanted
from tests.kernels.ptx.cases import Figures
from tests.kernels.ptx.emulator.outcome import Outcome
from vllm_moeq.kernels.triton.schedule import FEW, MANY


def test_the_table_has_every_schedule_of_an_architecture() -> None:
    cases = list(wanted(["sm_120"], every=False))
    assert [case.schedule for case in cases if not case.rings] == [*FEW, *MANY]
    assert any(case.rings for case in cases)
    assert {case.arch for case in cases} == {"sm_120"}
    assert {case.arch for case in wanted(["sm_89"], every=True)} == {"sm_89"}


def test_a_row_has_a_cell_for_each_column() -> None:
    case = next(wanted(["sm_80"], every=False))
    figures = Figures(2.4e-3, 2.3e-3, 0.0, Outcome(2.4e-3, set(), [], [], False), ["a race"])
    line = row(case, figures)
    assert line == "| sm_80 | few_tokens | 64×8 | bf16 | 1 | 2 | mixed | 2.4e-03 | 2.3e-03 | 0.0e+00 | a race |"
    assert line.count("|") == HEADER.splitlines()[0].count("|")
