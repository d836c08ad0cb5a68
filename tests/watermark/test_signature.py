"""The signature on the picture, judged by its pixels."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from watermark.errors import FontMissing, SignatureInvalid
from watermark.geometry import Position
from watermark.signature import (
    ImageSignature,
    Signature,
    SignatureStyle,
    SignedImage,
    Size,
    TextSignature,
    Unsigned,
    sign,
)
from watermark.text.fonts import find_font
from watermark.text.mark import draw_text

FONT_DIRS = (Path("/usr/share/fonts"),)
RED = (255, 0, 0, 255)


def noise(width: int = 200, height: int = 100) -> Image.Image:
    """Draw an image no two neighbouring pixels of which are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def signed(image: Image.Image, signature: Signature, **style: Any) -> NDArray[np.int16]:
    """Sign, encode and decode again: (height, width, 3)."""
    encoded = sign(image, signature, SignatureStyle(**{"opacity": 1.0, **style})).encode_png()
    return np.asarray(Image.open(io.BytesIO(encoded))).astype(np.int16)


def changed_box(image: Image.Image, after: NDArray[np.int16]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the pixels that differ from `image`."""
    changed = np.any(np.asarray(image.convert("RGB")) != after, axis=-1)
    box = Image.fromarray(changed.astype(np.uint8) * 255).getbbox()
    assert box is not None
    return box


# --- where and how large


@pytest.mark.parametrize("position", Position)
def test_each_position_puts_the_signature_at_its_anchor(position: Position) -> None:
    # Given a picture of 200x100 px, whose margin is 2 px, and a signature that becomes 50x25 px
    image = Image.new("RGB", (200, 100), "white")

    after = signed(image, ImageSignature(Image.new("RGBA", (100, 50), RED)), position=position)

    vertical, _, horizontal = position.value.partition("-")
    left = {"left": 2, "right": 200 - 2 - 50}.get(horizontal, 75)
    top = {"top": 2, "bottom": 100 - 2 - 25}[vertical] if vertical != "center" else pytest.approx(37.5, abs=0.5)
    box = changed_box(image, after)
    assert box[0] == left
    assert box[1] == top
    assert (box[2] - box[0], box[3] - box[1]) == (50, 25)


@pytest.mark.parametrize(("size", "width"), [(Size.SMALL, 60), (Size.MEDIUM, 100), (Size.LARGE, 140)])
def test_each_size_is_its_fraction_of_the_width_with_the_aspect_kept(size: Size, width: int) -> None:
    image = Image.new("RGB", (400, 400), "white")
    left, top, right, bottom = changed_box(
        image, signed(image, ImageSignature(Image.new("RGBA", (300, 100), RED)), size=size)
    )
    assert right - left == width
    assert bottom - top == round(width / 3)


@pytest.mark.parametrize("position", Position)
@pytest.mark.parametrize("shape", [(10, 4000), (4000, 1), (1, 1), (1, 4096)])
def test_a_signature_of_any_shape_stays_inside_the_margins(shape: tuple[int, int], position: Position) -> None:
    image = Image.new("RGB", (256, 64), "white")
    signature = ImageSignature(Image.new("RGBA", shape, RED))

    left, top, right, bottom = changed_box(image, signed(image, signature, position=position, size=Size.LARGE))

    assert left >= 1
    assert top >= 1
    assert right <= 255
    assert bottom <= 63


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(Position),
    st.floats(0, 0.25),
)
def test_signing_succeeds_at_any_size(
    size: tuple[int, int], mark_size: tuple[int, int], position: Position, margin: float
) -> None:
    mark = ImageSignature(Image.new("RGBA", mark_size, RED))
    image = sign(Image.new("RGB", size), mark, SignatureStyle(position, Size.LARGE, 1.0, margin))
    assert (image.width, image.height) == size


# --- pixels


@pytest.mark.parametrize("text", [None, "Ann"])
@pytest.mark.parametrize("position", Position)
def test_outside_the_signature_every_byte_stays(position: Position, text: str | None) -> None:
    image = noise()
    signature = TextSignature(text, FONT_DIRS) if text else ImageSignature(Image.new("RGBA", (100, 50), RED))

    after = signed(image, signature, position=position)

    left, top, right, bottom = changed_box(image, after)
    assert (right - left) * (bottom - top) <= 50 * 25
    before = np.asarray(image).astype(np.int16)
    before[top:bottom, left:right] = after[top:bottom, left:right]
    np.testing.assert_array_equal(before, after)


def test_an_unsigned_image_keeps_every_byte() -> None:
    np.testing.assert_array_equal(signed(noise(), Unsigned()), np.asarray(noise()))


@pytest.mark.parametrize("opacity", [0.0, 0.25, 0.7, 1.0])
def test_opacity_multiplies_the_alpha_of_the_signature(opacity: float) -> None:
    # Given a signature that is half transparent itself, on grey
    signature = ImageSignature(Image.new("RGBA", (40, 40), (255, 255, 255, 128)))

    after = signed(Image.new("RGB", (100, 100), (100, 100, 100)), signature, opacity=opacity, position=Position.CENTER)

    expected = 100 + (255 - 100) * opacity * 128 / 255
    assert after[50, 50] == pytest.approx([expected] * 3, abs=0.51)


@pytest.mark.parametrize("hidden", [(0, 0, 0, 0), (255, 255, 255, 0), (0, 255, 0, 0)])
@pytest.mark.parametrize("side", [30, 800])
def test_colours_hidden_in_transparent_pixels_never_show(hidden: tuple[int, int, int, int], side: int) -> None:
    # Given a red disc on transparent pixels of another colour, on a picture of the same red, to be scaled down or up
    disc = Image.new("L", (side, side))
    Image.Image.paste(disc, 255, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    signature = Image.composite(Image.new("RGBA", disc.size, RED), Image.new("RGBA", disc.size, hidden), disc)

    after = signed(Image.new("RGB", (333, 333), RED[:3]), ImageSignature(signature), size=Size.LARGE)

    # Then nothing of the other colour is seen, not even at the edges
    assert np.abs(after - np.array(RED[:3])).max() <= 1


def test_the_same_input_gives_the_same_bytes() -> None:
    for signature in (ImageSignature(noise().convert("RGBA")), TextSignature("서울", FONT_DIRS)):
        first, second = (sign(noise(), signature, SignatureStyle()).encode_png() for _ in range(2))
        assert first == second


def test_the_encoded_image_is_a_plain_rgb_png() -> None:
    image = noise().convert("RGBA")
    image.info |= {"icc_profile": b"secret", "prompt": "secret", "transparency": 3, "exif": b"Exif\0\0secret"}

    encoded = sign(image, Unsigned(), SignatureStyle()).encode_png()

    opened = Image.open(io.BytesIO(encoded))
    assert (opened.format, opened.mode, opened.info) == ("PNG", "RGB", {})
    assert b"secret" not in encoded


def test_the_given_image_is_left_alone() -> None:
    image = noise()
    sign(image, ImageSignature(Image.new("RGBA", (9, 9), RED)), SignatureStyle(opacity=1))
    np.testing.assert_array_equal(image, noise())


def test_a_signed_image_comes_from_sign_alone() -> None:
    with pytest.raises(TypeError, match="sign"):
        SignedImage(noise(), object())  # type: ignore[arg-type]
    assert not hasattr(Image.Image, "encode_png")


@pytest.mark.parametrize(
    "wrong", [{"opacity": math.nan}, {"opacity": 2}, {"opacity": -0.1}, {"margin": math.nan}, {"margin": 0.5}]
)
def test_a_style_out_of_range_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be from 0 to"):
        SignatureStyle(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["__class__", "", "TOP-LEFT", "middle"])
def test_only_the_nine_names_are_positions(name: str) -> None:
    with pytest.raises(ValueError, match="not a valid Position"):
        Position(name)


# --- text


def test_hangul_is_drawn_with_glyphs_of_its_own_and_not_with_the_box_of_a_missing_one() -> None:
    font = find_font("서울", FONT_DIRS)
    marks = [
        draw_text(char, font, fit=(60, 60), limit=(60, 60)).tobytes()
        for char in ("서", "울", "\U0010fffd")  # the last one no font has: its box is what missing glyphs look like
    ]
    for one, other in itertools.combinations(marks, 2):
        assert one != other


def test_text_is_white_with_a_dark_outline_so_that_it_reads_on_both() -> None:
    for ground in (0, 255):
        image = Image.new("RGB", (256, 256), (ground,) * 3)
        after = signed(image, TextSignature("서울 아틀리에", FONT_DIRS), size=Size.LARGE)
        left, top, right, bottom = changed_box(image, after)
        drawn = after[top:bottom, left:right]
        assert drawn.max() == 255
        assert drawn.min() <= 24


def test_edges_of_text_are_never_darker_than_outline_and_ground() -> None:
    after = signed(Image.new("RGB", (256, 256), (200, 200, 200)), TextSignature("Ann", FONT_DIRS))
    assert after.min() >= 24


@pytest.mark.parametrize(("size", "width"), [(Size.SMALL, 77), (Size.MEDIUM, 128), (Size.LARGE, 179)])
def test_text_takes_the_width_of_its_size(size: Size, width: int) -> None:
    image = Image.new("RGB", (512, 512), (90, 120, 150))
    left, _, right, _ = changed_box(image, signed(image, TextSignature("서울 아틀리에", FONT_DIRS), size=size))
    assert 0.8 * width <= right - left <= width


@pytest.mark.parametrize("text", ["서울 아틀리에", "J", "W" * 100])
def test_text_of_any_length_stays_inside_a_small_image(text: str) -> None:
    image = Image.new("RGB", (128, 64), (90, 120, 150))
    left, top, right, bottom = changed_box(image, signed(image, TextSignature(text, FONT_DIRS), size=Size.SMALL))
    assert left >= 1
    assert top >= 1
    assert right <= 127
    assert bottom <= 63


def test_decomposed_hangul_is_the_same_signature_as_composed() -> None:
    composed = TextSignature("서울", FONT_DIRS)
    assert TextSignature("  \u1109\u1165\u110b\u116e\u11af ", FONT_DIRS) == composed


def test_a_font_is_taken_only_if_it_has_every_character() -> None:
    assert "Nanum" in find_font("서울 Ann", FONT_DIRS).stem
    assert "DejaVu" in find_font("∰", FONT_DIRS).stem


@pytest.mark.parametrize("font_dirs", [FONT_DIRS, (), (Path("/nowhere"),)])
def test_characters_no_font_has_are_named(font_dirs: tuple[Path, ...]) -> None:
    with pytest.raises(FontMissing, match=r"U\+12000"):
        TextSignature("Ann \U00012000", font_dirs)


def test_a_broken_font_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "NanumGothicBold.ttf").write_bytes(b"\x00\x01\x00\x00" + b"\xff" * 40)
    (tmp_path / "NanumGothic.ttf").write_bytes(b"no font")
    whole = find_font("서", FONT_DIRS).read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "NanumGothic.ttf").write_bytes(whole.replace(b"maxp", b"mbxp", 1).replace(b"post", b"pbst", 1))
    found = find_font("서", (tmp_path, *FONT_DIRS))
    assert found.parent not in {tmp_path, tmp_path / "a"}


@pytest.mark.parametrize("text", ["", " \u3000", "a\nb", "a\x00", "a\u202eb", "\u200b", "\ud800", "\ufdd0", "x" * 101])
def test_invalid_line_of_text_is_refused(text: str) -> None:
    with pytest.raises(SignatureInvalid, match="signature text"):
        TextSignature(text, FONT_DIRS)


def test_letters_that_leave_no_ink_are_refused() -> None:
    with pytest.raises(SignatureInvalid, match="no visible character"):
        TextSignature("\u3164", FONT_DIRS)
