"""Find the region of an image with the least gradient energy, for text or a product."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from watermark.geometry import Rect

# The summed-area table is over cells, not pixels: half a megabyte instead of 34 for the largest image.
MAX_CELLS = 256
# Positions count as equal whose mean gradients differ by less than a twentieth or, near zero, than a two-hundredth of a
# grey level.
STEPS_PER_E_FOLD = 20
FAINTEST_GREY_LEVELS = 0.1


def quietest_region(
    image: Image.Image,
    size: tuple[int, int],
    *,
    within: Rect | None = None,
    avoid: tuple[Rect, ...] = (),
    towards: tuple[float, float] = (0.5, 0.5),
) -> tuple[int, int]:
    """Return left and top px at which a block of `size` (width, height) covers the least gradient energy of `image`.

    The block stays inside `within`, by default the image; a larger one is aligned to its left or top. The least overlap
    with `avoid` comes first, then the least energy; among equals the nearest to `towards`, where (0, 0) is the left and
    top of `within` and (1, 1) the right and bottom; then the topmost and the leftmost.

    The energy is the sum of the absolute differences between neighbouring pixels' luminance. Positions are compared in
    steps of a 256th of the longer side, by a summed-area table (Crow 1984).
    """
    within = within or Rect(0, 0, *image.size)
    cell = -(-max(image.size) // MAX_CELLS)
    lefts = _offsets(within.left, within.right - size[0], cell)
    tops = _offsets(within.top, within.bottom - size[1], cell)

    covered = np.zeros((len(tops), len(lefts)))
    for rect in avoid:
        covered += np.outer(
            _overlap(tops, size[1], rect.top, rect.bottom), _overlap(lefts, size[0], rect.left, rect.right)
        )
    energy = _mean_energy(image, size, lefts, tops, cell)
    gradient_energy = np.rint(np.log1p(energy.clip(min=0) / FAINTEST_GREY_LEVELS) * STEPS_PER_E_FOLD)
    away = np.add.outer(_distance(tops, towards[1]) ** 2, _distance(lefts, towards[0]) ** 2)

    # lexsort sorts by its last key first, and is stable: equals stay in reading order.
    best = np.lexsort((away.ravel(), gradient_energy.ravel(), covered.ravel()))[0]
    row, column = divmod(int(best), len(lefts))
    return int(lefts[column]), int(tops[row])


def gradient_energy(image: Image.Image, rect: Rect) -> float:
    """Return the mean gradient energy inside `rect`, in grey levels per px: 0 for a single colour."""
    return float(_cells(image.crop(rect), 1 + max(rect.size) // MAX_CELLS).sum()) / (rect.size[0] * rect.size[1])


def _offsets(first: int, last: int, step: int) -> NDArray[np.int64]:
    """Return the candidate offsets from `first` to `last`, at least `first`."""
    return np.append(np.arange(first, last, step), max(first, last))


def _overlap(starts: NDArray[np.int64], length: int, low: int, high: int) -> NDArray[np.int64]:
    """Return how many px of [low, high) a block of `length` covers at each of `starts`."""
    return (np.minimum(starts + length, high) - np.maximum(starts, low)).clip(min=0)


def _distance(places: NDArray[np.int64], towards: float) -> NDArray[np.float64]:
    wanted = float(places[0] + (places[-1] - places[0]) * towards)
    away: NDArray[np.float64] = np.abs(places - wanted)
    return away


def _mean_energy(
    image: Image.Image, size: tuple[int, int], lefts: NDArray[np.int64], tops: NDArray[np.int64], cell: int
) -> NDArray[np.float64]:
    """Return (tops, lefts): mean gradient, in grey levels per px, of the cells that a block touches at each offset."""
    table = np.pad(_cells(image, cell), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    left, right = (side.clip(0, table.shape[1] - 1) for side in (lefts // cell, -(-(lefts + size[0]) // cell)))
    top, bottom = (side.clip(0, table.shape[0] - 1) for side in (tops // cell, -(-(tops + size[1]) // cell)))
    energy: NDArray[np.float64] = table[np.ix_(bottom, right)] - table[np.ix_(top, right)]
    energy += table[np.ix_(top, left)] - table[np.ix_(bottom, left)]
    energy /= np.outer(bottom - top, right - left).clip(min=1) * cell**2
    return energy


def _cells(image: Image.Image, cell: int) -> NDArray[np.float64]:
    """Sum the energy of `image` over squares of `cell` px; the last ones may extend beyond it."""
    grey = image.convert("L")
    # On 8-bit images, not wider arrays: the supervisor that calls this must stay small.
    beside = ImageChops.difference(grey, ImageChops.offset(grey, 1, 0))
    below = ImageChops.difference(grey, ImageChops.offset(grey, 0, 1))
    # `offset` wraps around: the opposite edge is no neighbour.
    beside.paste(0, (0, 0, 1, grey.height))
    below.paste(0, (0, 0, grey.width, 1))
    return _per_cell(beside, cell) + _per_cell(below, cell)


def _per_cell(grey: Image.Image, cell: int) -> NDArray[np.float64]:
    pixels = np.asarray(grey)
    # Stripe by stripe: numpy would widen the whole image at once.
    rows = np.stack([pixels[top : top + cell].sum(axis=0, dtype=np.int64) for top in range(0, grey.height, cell)])
    return np.add.reduceat(rows, np.arange(0, grey.width, cell), axis=1).astype(np.float64)
