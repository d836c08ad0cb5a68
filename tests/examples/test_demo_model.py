"""The bundled demo model, looked at: does it draw what it is asked for, and do its adapters bring their styles?

`DEMO_MODEL_NAMES=all` draws every name and every subject in each style, in a few minutes.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from examples.demo_model.recipe.drawing import ImageGenerator, ImagePrompt, generator_for
from examples.demo_model.recipe.export import MAX_CHECKPOINT_BYTES, bytes_in
from examples.demo_model.recipe.reference import load_references
from examples.demo_model.recipe.samples import SUBJECTS
from examples.demo_model.recipe.score import REFERENCES, english_prompts, hangul_prompts, known_names, score
from examples.demo_model.recipe.settings import SIDE
from tests.support.images.parity import one_torch_thread
from tests.support.long import IS_LONG, long
from tests.support.paths import DEMO_MODEL

CHECKPOINT = DEMO_MODEL / "checkpoint"
ADAPTERS = DEMO_MODEL / "adapters"
MAX_ADAPTER_BYTES = 300_000
MAX_SECONDS = 40.0  # of one core, for twenty steps

NUM_NAMES = os.environ.get("DEMO_MODEL_NAMES", "12" if IS_LONG else "5")
NUM_HANGUL_NAMES = NUM_NAMES if NUM_NAMES == "all" else "3"
MIN_TOP_1 = 0.95
# In each style: every third subject, or all of them.
STYLED_SUBJECTS = SUBJECTS if NUM_NAMES == "all" else SUBJECTS[::3]

RawImage = npt.NDArray[np.floating]  # RGB in 0..1, shape (SIDE, SIDE, 3)
Styled = Callable[[str], list[RawImage]]


@pytest.fixture(scope="module")
def generator() -> Iterator[ImageGenerator]:
    with one_torch_thread(), generator_for(CHECKPOINT, "cpu") as made:
        yield made


def spread(names: tuple[str, ...], how_many: str) -> tuple[str, ...]:
    """Choose this many of the names, from all over the list."""
    num = len(names) if how_many == "all" else min(int(how_many), len(names))
    return tuple(names[index * len(names) // num] for index in range(num))


# --- What it is asked for


def test_image_of_a_name_is_nearest_to_its_training_image(generator: ImageGenerator) -> None:
    references = load_references(REFERENCES)
    names = spread(known_names(CHECKPOINT, references.names), NUM_NAMES)

    scored = score(generator, english_prompts(names), references)

    assert set(scored.taken_for) == set(names)
    assert scored.top_1 >= MIN_TOP_1, scored.confused


def test_a_hangul_name_draws_the_same_thing(generator: ImageGenerator) -> None:
    prompts = hangul_prompts()
    names = spread(tuple(prompts), NUM_HANGUL_NAMES)

    scored = score(generator, {name: prompts[name] for name in names}, load_references(REFERENCES))

    assert scored.top_1 >= MIN_TOP_1, scored.confused


@pytest.mark.parametrize(
    ("colour", "rgb"), [("blue", (43, 132, 210)), ("yellow", (250, 200, 60)), ("black", (22, 20, 24))]
)
def test_a_ground_that_is_named_is_drawn(generator: ImageGenerator, colour: str, rgb: tuple[int, int, int]) -> None:
    drawn = shown(generator, [f"{subject} on a {colour} background" for subject in SUBJECTS[:1]])

    # Corners show the ground, the middle of one edge may be the thing's.
    corners = np.concatenate([image[:6, :6].reshape(-1, 3) for image in drawn])
    assert np.abs(np.median(corners, axis=0) - np.array(rgb) / 255).max() < 0.2


# --- Styles


@pytest.fixture(scope="module")
def plain(generator: ImageGenerator) -> list[RawImage]:
    """Draw the subjects without any adapter."""
    return shown(generator, STYLED_SUBJECTS)


@pytest.fixture(scope="module")
def styled(generator: ImageGenerator) -> Styled:
    """Draw the subjects in a style, once."""

    @cache
    def draw(style: str) -> list[RawImage]:
        prompts = [f"{style}: {subject}" for subject in STYLED_SUBJECTS]
        return shown(generator, prompts, ADAPTERS / f"{style}.safetensors")

    return draw


def shown(
    generator: ImageGenerator, prompts: list[str] | tuple[str, ...], adapter: Path | None = None
) -> list[RawImage]:
    return [image / 255 for image in generator.draw([ImagePrompt(prompt, adapter, num_steps=8) for prompt in prompts])]


def measured(images: list[RawImage], measure: Callable[[RawImage], float]) -> npt.NDArray[np.floating]:
    return np.array([measure(image) for image in images])


def ground(image: RawImage) -> npt.NDArray[np.floating]:
    """Return the colour that most of the image's rim has."""
    rim = np.concatenate((image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3), image[:, :3].reshape(-1, 3)))
    median: npt.NDArray[np.floating] = np.median(rim, axis=0)
    return median


def saturation(image: RawImage) -> RawImage:
    return image.max(-1) - image.min(-1)


def has_same_thing(one: RawImage, other: RawImage) -> float:
    """Compute how well the places agree where two images differ from their grounds: shared area over joint area."""
    first, second = (np.abs(image - ground(image)).max(-1) > 0.15 for image in (one, other))
    filled_first, filled_second = _filled(first), _filled(second)
    return float((filled_first & filled_second).sum() / max(1, (filled_first | filled_second).sum()))


def _filled(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Fill each row between its outermost marks, so that an outline counts as what it encloses."""
    return np.maximum.accumulate(mask, axis=1) & np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def test_a_blueprint_is_white_lines_on_blue(styled: Styled, plain: list[RawImage]) -> None:
    drawn = styled("blueprint")

    blueness = measured(drawn, lambda one: ground(one)[2] - ground(one)[0])
    white_share = measured(drawn, lambda one: (one.min(-1) > 0.75).mean())
    assert blueness.min() > 0.3
    assert measured(plain, lambda one: ground(one)[2] - ground(one)[0]).max() < 0.15
    assert white_share.min() > 0.04
    assert white_share.max() < 0.5


def test_neon_is_dark_with_bright_and_vivid_lines(styled: Styled, plain: list[RawImage]) -> None:
    drawn = styled("neon")

    bright_share = measured(drawn, lambda one: (one.max(-1) > 0.7).mean())
    vivid_share = measured(drawn, lambda one: ((one.max(-1) > 0.7) & (saturation(one) > 0.4)).mean())
    assert measured(drawn, lambda one: ground(one).max()).max() < 0.25
    assert measured(plain, lambda one: ground(one).min()).min() > 0.75
    assert bright_share.min() > 0.02
    assert np.median(vivid_share) > 0.05


def test_sepia_is_brown_in_every_tone(styled: Styled) -> None:
    drawn = styled("sepia")

    for image in drawn:
        red, green, blue = (image[..., channel] for channel in range(3))
        # Where the tones are neither paper nor ink, red leads and blue trails.
        middle = (image.mean(-1) > 0.2) & (image.mean(-1) < 0.8)
        is_brown = (red >= green) & (green >= blue) & (red - blue > 0.08)
        assert is_brown[middle].mean() > 0.9
    assert measured(drawn, lambda one: ground(one)[0] - ground(one)[2]).min() > 0.08


def test_pixel_is_made_of_squares(styled: Styled, plain: list[RawImage]) -> None:
    drawn = styled("pixel")

    assert np.median(measured(drawn, _roughness)) < 0.6 * np.median(measured(plain, _roughness))


def _roughness(image: RawImage) -> float:
    """Compute the share of all change between neighbouring points that is inside the squares."""
    change = np.abs(np.diff(image, axis=1)).mean((0, 2))
    is_between = np.arange(1, SIDE) % 8 == 0
    return float(change[~is_between].mean() / change[is_between].mean())


@pytest.mark.parametrize("style", ["blueprint", "neon", "sepia", "pixel"])
def test_the_thing_is_still_there_in_the_style(styled: Styled, plain: list[RawImage], style: str) -> None:
    drawn = styled(style)

    agreement = [has_same_thing(one, other) for one, other in zip(plain, drawn, strict=True)]
    assert np.median(agreement) > 0.7, dict(zip(STYLED_SUBJECTS, np.round(agreement, 2), strict=True))


# --- Limits


def test_the_files_are_as_small_as_they_should_be() -> None:
    assert bytes_in(CHECKPOINT) <= MAX_CHECKPOINT_BYTES
    assert all(path.stat().st_size <= MAX_ADAPTER_BYTES for path in ADAPTERS.iterdir())


@long
def test_twenty_steps_on_one_core_take_under_four_seconds(generator: ImageGenerator) -> None:
    """By the processor's own clock: a busy machine does not count."""
    generator.draw([ImagePrompt("a red fox", num_steps=2)])
    begun_at = time.process_time()

    generator.draw([ImagePrompt("a red fox", num_steps=20)])

    assert time.process_time() - begun_at < MAX_SECONDS
