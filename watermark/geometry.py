"""Rectangles in px, and the nine positions that a signature, a headline or a product can take."""

from enum import StrEnum
from typing import NamedTuple

ANCHORS = {"top": 0.0, "left": 0.0, "center": 0.5, "bottom": 1.0, "right": 1.0}


class Rect(NamedTuple):
    """A rectangle in px; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top

    def overlaps(self, other: "Rect") -> bool:
        """Return whether the two share a pixel."""
        return max(self.left, other.left) < min(self.right, other.right) and max(self.top, other.top) < min(
            self.bottom, other.bottom
        )


class Position(StrEnum):
    """Where a signature or a headline stands."""

    TOP_LEFT = "top-left"
    TOP_CENTER = "top-center"
    TOP_RIGHT = "top-right"
    CENTER_LEFT = "center-left"
    CENTER = "center"
    CENTER_RIGHT = "center-right"
    BOTTOM_LEFT = "bottom-left"
    BOTTOM_CENTER = "bottom-center"
    BOTTOM_RIGHT = "bottom-right"

    @property
    def fractions(self) -> tuple[float, float]:
        """Fractions (0 to 1) from the left and from the top."""
        vertical, _, horizontal = self.value.partition("-")
        return ANCHORS[horizontal or vertical], ANCHORS[vertical]
