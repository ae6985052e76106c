"""How far a run is, and what is left of it."""

from __future__ import annotations

import pytest

from planner.common.schedule import Schedule


def work(schedule: Schedule, name: str, total: int, begins: float, seconds: float) -> float:
    """Do all items of some work at an even pace; return when it ends."""
    schedule.enter(name, total, begins)
    for item in range(1, total + 1):
        schedule.start(item)
        schedule.finish(item, begins + seconds * item)
    return begins + seconds * total


def test_expected_seconds_are_what_is_left_at_first() -> None:
    schedule = Schedule([("read", 30.0), ("write", 10.0)], 100.0)
    assert schedule.expected == 40
    assert schedule.remaining(100.0) == pytest.approx(40)
    assert schedule.remaining(105.0) == pytest.approx(35)  # time goes by before the first item is done


def test_a_run_as_expected_counts_down() -> None:
    schedule = Schedule([("read", 30.0), ("write", 10.0)], 0.0)
    now = work(schedule, "read", 3, 0.0, 10.0)
    assert (now, schedule.fraction) == (30.0, pytest.approx(0.75))
    assert schedule.remaining(now) == pytest.approx(10)
    now = work(schedule, "write", 5, now, 2.0)
    assert (schedule.fraction, schedule.remaining(now)) == (pytest.approx(1), pytest.approx(0))


def test_a_slower_machine_is_noticed_for_the_parts_to_come() -> None:
    schedule = Schedule([("read", 30.0), ("write", 30.0)], 0.0)
    now = work(schedule, "read", 3, 0.0, 30.0)
    left = schedule.remaining(now)
    assert left is not None
    assert 75 < left < 90


def test_the_work_at_hand_has_its_own_pace() -> None:
    schedule = Schedule([("read", 10.0), ("write", 10.0)], 0.0)
    now = work(schedule, "read", 10, 0.0, 1.0)
    schedule.enter("write", 10, now)
    schedule.finish(1, now + 20)
    assert schedule.remaining(now + 20) == pytest.approx(180)


def test_what_is_left_out_counts_as_done() -> None:
    schedule = Schedule([("read", 10.0), ("measure", 70.0), ("write", 20.0)], 0.0)
    schedule.enter("write", 4, 1.0)
    assert schedule.fraction == pytest.approx(0.8)


def test_the_same_work_twice_is_two_parts_and_a_third_time_none() -> None:
    schedule = Schedule([("measure", 10.0), ("measure", 10.0), ("write", 20.0)], 0.0)
    for expected in (0.25, 0.5, 0.5):
        work(schedule, "measure", 2, 0.0, 5.0)
        assert schedule.fraction == pytest.approx(expected)


def test_work_on_the_way_takes_nothing_back() -> None:
    schedule = Schedule([("read", 10.0), ("write", 10.0)], 0.0)
    work(schedule, "read", 2, 0.0, 5.0)
    schedule.enter("something else", 3, 10.0)
    assert (schedule.name, schedule.total, schedule.fraction) == ("something else", 3, pytest.approx(0.5))
    schedule.finish(1, 11.0)
    assert schedule.fraction == pytest.approx(0.5)


def test_unknown_parts_count_alike_and_say_nothing_before_an_item_is_done() -> None:
    schedule = Schedule([("read", None), ("write", 5.0)], 0.0)
    assert (schedule.expected, schedule.remaining(0.0)) == (None, None)
    now = work(schedule, "read", 2, 0.0, 4.0)
    assert (schedule.fraction, schedule.remaining(now)) == (pytest.approx(0.5), pytest.approx(8))


def test_nothing_is_known_before_the_parts_are() -> None:
    schedule = Schedule((), 0.0)
    assert (schedule.fraction, schedule.remaining(0.0), schedule.expected) == (0, None, None)
    work(schedule, "read", 2, 0.0, 4.0)
    assert (schedule.fraction, schedule.remaining(8.0)) == (0, None)
