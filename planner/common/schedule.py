"""The parts of a run in order, with the seconds that each is expected to take: how far the run is, and what is left."""

from __future__ import annotations

from collections.abc import Sequence

Part = tuple[str, float | None]
"""(name of the work, expected seconds); None where nobody knows, and then for all parts: they count alike."""

TRUST = 0.1
"""Share of the whole run after which the measured pace counts as much as the expected seconds."""

LEAST = 1e-3
"""Minimum weight of a part, in seconds."""


class Schedule:
    """Knows how far a run is. Times are seconds of one clock.

    Args:
        parts: the work of the run, in order; parts that the run leaves out count as done when a later one begins.
        now: time at which the run begins.
    """

    def __init__(self, parts: Sequence[Part], now: float) -> None:
        self._names = [name for name, _ in parts]
        self.known = bool(parts) and all(seconds is not None for _, seconds in parts)
        self._weights = [max(seconds or 0.0, LEAST) if self.known else 1.0 for _, seconds in parts]
        self.began = self._entered = self._last = now
        self.name, self.item, self.done, self.total = "", 0, 0, 0
        self._at, self._within = -1, 0.0  # the present part, and the share of it that is done
        self._planned = False

    @property
    def expected(self) -> float | None:
        """The seconds that the whole run is expected to take; None if nobody knows."""
        return sum(self._weights) if self.known else None

    def enter(self, name: str, total: int, now: float) -> None:
        """Begin some work of ``total`` items. Work that is no part of the run is shown, and adds nothing."""
        later = [index for index in range(self._at + 1, len(self._names)) if self._names[index] == name]
        self._planned = bool(later)
        if later:
            self._at, self._within = later[0], 0.0
        self.name, self.item, self.done, self.total = name, 0, 0, total
        self._entered = self._last = now

    def start(self, item: int) -> None:
        """Say which item of the work is being done, from 1."""
        self.item = item

    def finish(self, done: int, now: float) -> None:
        """Say how many items of the work are done."""
        self.done, self._last = done, now
        if self._planned:
            self._within = done / self.total

    @property
    def fraction(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        return self._spent() / sum(self._weights) if self._weights else 0.0

    def remaining(self, now: float) -> float | None:
        """Return the seconds that are left of the whole run; None if nobody can tell yet."""
        spent, elapsed = self._spent(), self._last - self.began
        prior = TRUST * sum(self._weights) if self.known else 0.0
        if spent + prior <= 0:
            return None
        pace = (elapsed + prior) / (spent + prior)
        left = pace * (sum(self._weights) - spent)
        if self._planned and self.done:  # this work has a pace of its own
            left -= pace * self._weights[self._at] * (1 - self._within)
            left += (self._last - self._entered) / self.done * (self.total - self.done)
        return max(0.0, left - (now - self._last))

    def _spent(self) -> float:
        """Return the weight of what is done."""
        if self._at < 0:
            return 0.0
        return sum(self._weights[: self._at]) + self._weights[self._at] * self._within
