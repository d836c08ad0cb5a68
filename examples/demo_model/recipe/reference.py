"""What the score compares with: every thing's own training picture on white, coarsely."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

SIDE = 8  # squares along a picture's edge

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class References:
    """The things' names and the means (uint8, shape (names, SIDE, SIDE, 3)) of their pictures."""

    names: tuple[str, ...]
    means: npt.NDArray[np.uint8]

    def save(self, path: Path) -> None:
        np.savez_compressed(path, names=np.array(self.names), means=self.means)

    def nearest(self, means: npt.NDArray[np.uint8]) -> str:
        """Find the name whose image is the nearest to these means by their squared differences."""
        differences = self.means.astype(np.float64) - means
        return self.names[int(np.square(differences).sum(axis=(1, 2, 3)).argmin())]


def load_references(path: Path) -> References:
    with np.load(path) as kept:
        return References(tuple(str(name) for name in kept["names"]), kept["means"])


def means_of(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Compute the mean colours of a square image's squares, uint8, shape (SIDE, SIDE, 3)."""
    square = len(image) // SIDE
    means: Floats = image.reshape(SIDE, square, SIDE, square, 3).mean(axis=(1, 3))
    return means.round().astype(np.uint8)
