"""How large the cells of a map are and where its ticks stand, for 2 layers of 4 experts as for 61 of 256."""

from __future__ import annotations

from dataclasses import dataclass

FONT_WIDTH = 6.6
"""Pixels of a digit of an axis label, at 11 pixels."""

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Geometry:
    """Pixels of a map.

    Attributes:
        columns: experts of the largest layer.
        rows: layers.
        width: of a cell.
        height: of a cell.
        left: what the labels of layers take.
        titled: the axes have names.
    """

    columns: int
    rows: int
    width: int
    height: int
    left: int
    titled: bool

    TOP = 16
    """Above the cells: the ticks of experts."""

    TITLE = 18
    """For the name of an axis."""

    @classmethod
    def fit(
        cls, columns: int, labels: list[str], room: int, largest: tuple[int, int], tall: int, titled: bool = False
    ) -> Geometry:
        """Return cells that fit, whole pixels, so that all are alike.

        Args:
            columns: experts of the largest layer.
            labels: of the layers.
            room: pixels for labels and cells.
            largest: width and height that a cell has at most.
            tall: pixels that all rows together take if that leaves them readable.
            titled: the axes have names.
        """
        left = round(max(len(label) for label in labels) * FONT_WIDTH) + 10 + (cls.TITLE if titled else 0)
        width = max(2, min(largest[0], (room - left) // columns))
        height = max(min(4, width * 2), min(largest[1], tall // len(labels), max(width * 2, 8)))
        return cls(columns, len(labels), width, height, left, titled)

    @property
    def right(self) -> int:
        """Where cells end."""
        return self.left + self.columns * self.width

    @property
    def bottom(self) -> int:
        """Where cells end."""
        return self.TOP + self.rows * self.height

    @property
    def lined(self) -> bool:
        """Whether lines between cells would leave enough of them."""
        return min(self.width, self.height) >= 7

    def column_ticks(self) -> range:
        """Return the experts that are named, so that their numbers do not touch."""
        wide = len(str(self.columns - 1)) * FONT_WIDTH + 6
        return range(0, self.columns, _step(self.columns, wide / self.width))

    def row_ticks(self) -> range:
        """Return the layers that are named."""
        return range(0, self.rows, _step(self.rows, 13 / self.height))


def _step(count: int, least: float) -> int:
    return next((step for step in STEPS if step >= least), count)
