"""Where a picture is calm, on pictures whose calm places are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from watermark.geometry import Rect
from watermark.quiet_region import quietest_region


def noise(width: int, height: int, calm: Rect = Rect(0, 0, 0, 0)) -> Image.Image:  # noqa: B008 - immutable
    """Draw noise, but for one rectangle of plain grey."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[calm.top : calm.bottom, calm.left : calm.right] = 128
    return Image.fromarray(pixels)


def at(place: tuple[int, int], size: tuple[int, int]) -> Rect:
    return Rect(*place, place[0] + size[0], place[1] + size[1])


def shared(one: Rect, other: Rect) -> int:
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    return max(0, width) * max(0, height)


@settings(max_examples=40, deadline=None)
@given(left=st.integers(0, 380), top=st.integers(0, 250))
def test_quietest_region_is_found_anywhere(left: int, top: int) -> None:
    calm = Rect(left, top, left + 120, top + 50)
    found = at(quietest_region(noise(500, 300, calm), (110, 40)), (110, 40))
    assert shared(found, calm) >= 0.97 * 110 * 40


def test_fine_noise_has_gradient_energy_though_its_mean_is_flat() -> None:
    # Given noise on the left, which small thumbnails would show as even grey, and a gentle slope on the right
    image = noise(400, 200)
    image.paste(Image.linear_gradient("L").resize((200, 200)).convert("RGB"), (200, 0))
    assert quietest_region(image, (150, 100))[0] >= 200


@pytest.mark.parametrize(
    ("towards", "place"), [((0.5, 0.5), (150, 125)), ((0.5, 0.0), (150, 0)), ((1.0, 1.0), (300, 250)), ((0, 0), (0, 0))]
)
def test_preferred_place_wins_among_equals(towards: tuple[float, float], place: tuple[int, int]) -> None:
    found = quietest_region(Image.new("RGB", (400, 300)), (100, 50), towards=towards)
    assert found == pytest.approx(place, abs=2)


def test_area_to_avoid_is_avoided_even_where_it_alone_is_quiet() -> None:
    calm = Rect(100, 100, 300, 200)
    found = at(quietest_region(noise(500, 300, calm), (100, 50), avoid=(calm,)), (100, 50))
    assert shared(found, calm) == 0


def test_area_to_avoid_is_covered_as_little_as_possible() -> None:
    middle = Rect(60, 0, 140, 100)
    found = at(quietest_region(Image.new("RGB", (200, 100)), (80, 100), avoid=(middle,)), (80, 100))
    assert shared(found, middle) == 20 * 100


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.integers(0, 300), st.integers(0, 300)),
)
def test_a_block_that_fits_stays_inside(
    image: tuple[int, int], part: tuple[float, float], inset: tuple[int, int]
) -> None:
    left, top = (min(inset[axis], (image[axis] - 1) // 2) for axis in (0, 1))
    within = Rect(left, top, image[0] - left, image[1] - top)
    size = tuple(max(1, int(whole * share)) for whole, share in zip(within.size, part, strict=True))

    found = at(quietest_region(noise(*image), (size[0], size[1]), within=within), (size[0], size[1]))

    assert shared(found, within) == size[0] * size[1]


def test_block_too_large_is_placed_at_the_left_and_top() -> None:
    assert quietest_region(noise(100, 100), (300, 200)) == (0, 0)


def test_the_same_image_gives_the_same_place() -> None:
    assert quietest_region(noise(300, 300), (50, 50)) == quietest_region(noise(300, 300), (50, 50))
