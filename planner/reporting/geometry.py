"""Choose the size of a map's cells and the positions of its ticks, for 2 layers of 4 experts up to 61 of 256."""

from __future__ import annotations

from dataclasses import dataclass

FONT_WIDTH = 6.6
"""Width in pixels of a digit in an axis label with a font size of 11 pixels."""

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

AMPLE = "ample"
"""CSS class of what has no room in windows under 900 pixels: there, it is hidden."""

AMPLE_ROOM, NARROW_ROOM = 850, 288
"""Width of the content in pixels in the narrowest window of each kind: 900 pixels, and a phone's 320."""


@dataclass(frozen=True)
class Geometry:
    """Dimensions of a map; lengths are in pixels.

    Attributes:
        columns: number of experts of the largest layer.
        rows: number of layers.
        width: width of a cell.
        height: height of a cell.
        left: width of the layers' labels.
        titled: whether the axes have names.
    """

    columns: int
    rows: int
    width: int
    height: int
    left: int
    titled: bool

    TOP = 16
    """Height of the experts' ticks above the cells."""

    TITLE = 18
    """Room for the name of an axis."""

    @classmethod
    def fit(
        cls, columns: int, labels: list[str], room: int, largest: tuple[int, int], tall: int, titled: bool = False
    ) -> Geometry:
        """Return the dimensions of a map that fits. Cells have whole pixels, so that all look alike.

        Args:
            columns: number of experts of the largest layer.
            labels: labels of the layers.
            room: width in pixels for labels and cells.
            largest: maximum width and height of a cell in pixels.
            tall: target height of all rows in pixels; rows take more if they would be unreadable.
            titled: whether the axes have names.
        """
        left = round(max(len(label) for label in labels) * FONT_WIDTH) + 10 + (cls.TITLE if titled else 0)
        width = max(2, min(largest[0], (room - left) // columns))
        height = max(min(4, width * 2), min(largest[1], tall // len(labels), max(width * 2, 8)))
        return cls(columns, len(labels), width, height, left, titled)

    @property
    def across(self) -> int:
        """Width of all cells in pixels, where there is room for it."""
        return self.columns * self.width

    @property
    def down(self) -> int:
        """Height of all cells in pixels."""
        return self.rows * self.height

    def shrunk(self, room: int) -> float:
        """Return the width of a cell in pixels, where the map has ``room`` pixels: cells get narrower, never lower."""
        return min(self.width, (room - self.left) / self.columns)

    def where(self, least: float) -> str | None:
        """Return where cells are at least so wide: the CSS class of the windows, empty for all, None for none."""
        if self.shrunk(NARROW_ROOM) >= least:
            return ""
        return AMPLE if self.shrunk(AMPLE_ROOM) >= least else None

    @property
    def lined(self) -> bool:
        """Whether the cells are large enough for lines between them."""
        return min(self.width, self.height) >= 7

    def column_ticks(self) -> dict[int, str]:
        """Return expert → CSS class for the experts to label. Their numbers do not touch in any window."""
        label = len(str(self.columns - 1)) * FONT_WIDTH + 6
        ample, narrow = (_step(self.columns, label / self.shrunk(room)) for room in (AMPLE_ROOM, NARROW_ROOM))
        return {expert: AMPLE if expert % narrow else "" for expert in range(0, self.columns, ample)}

    def row_ticks(self) -> range:
        """Return the layers to label."""
        return range(0, self.rows, _step(self.rows, 13 / self.height))


def _step(count: int, least: float) -> int:
    return next((step for step in STEPS if step >= least), count)
