"""Headlines on pictures, judged by their pixels; lines and fonts by name beside them."""

import io
import json
import re
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from typer.testing import CliRunner

from tests.support.long import IS_LONG, long
from tests.support.paths import DEMO_MODEL
from watermark.errors import FontMissing, OverlayInvalid
from watermark.geometry import Position, Rect
from watermark.signature import SignatureStyle, TextSignature, Unsigned, sign, signature_rect
from watermark.text.fonts import code_points
from watermark.text.headline import MARGIN, draw_headlines, prepare_headline, prepare_headlines
from watermark.text.mark import is_visible
from watermark.text.overlay import Box, Stroke, TextOverlay
from watermark.text.scripts import Script, covered_scripts
from watermark.text.typefaces import choose_typeface, list_typefaces
from watermark.text.typesetting import Typesetter
from watermark.text.wrapping import Breaking, wrap
from worker.cli.main import app

FONT_DIRS = (Path("/usr/share/fonts"),)
EXAMPLES = 30 if IS_LONG else 12
TEXTS = {
    "English": "Autumn blends, roasted today",
    "Korean": "가을 한정 원두 커피를 지금 만나 보세요",
    "Japanese": "秋の新作コレクション、本日より発売！",
    "Chinese": "全新咖啡馆今日盛大开业，欢迎光临",
}


def put(image: Image.Image, *overlays: TextOverlay, avoid: tuple[Rect, ...] = ()) -> NDArray[np.int16]:
    """Put the headlines on the image; return (height, width, 3)."""
    drawn = draw_headlines(image, prepare_headlines(overlays, FONT_DIRS), avoid=avoid)
    assert (drawn.mode, drawn.size) == ("RGB", image.size)
    return np.asarray(drawn).astype(np.int16)


def changed(image: Image.Image, after: NDArray[np.int16]) -> Rect:
    """Return the pixels that the headline covers."""
    box = Image.fromarray(np.any(np.asarray(image) != after, axis=-1).astype(np.uint8)).getbbox()
    assert box is not None
    return Rect(*box)


def grey(width: int = 400, height: int = 400, level: int = 20) -> Image.Image:
    return Image.new("RGB", (width, height), (level,) * 3)


# --- nothing leaves the picture


texts = st.one_of(
    st.sampled_from([*TEXTS.values(), "W" * 300, "대한민국만세" * 50, "x\n" * 150, "g", "「漢」" * 100, "ÅÇ q\n\nj"]),
    st.text(st.sampled_from("aW ,gÅ가힣 漢字。「ァ\n"), min_size=1, max_size=60).filter(
        lambda text: text.strip(" \n\u3000")
    ),
)
dresses = st.fixed_dictionaries(
    {
        "size": st.one_of(st.none(), st.floats(0.01, 0.5)),
        "stroke": st.one_of(st.none(), st.builds(Stroke, st.floats(0, 0.2), st.none())),
        "shadow": st.booleans(),
        "box": st.one_of(st.none(), st.builds(Box, st.none(), st.floats(0, 1))),
        "position": st.one_of(st.none(), st.sampled_from(Position)),
    }
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts, dress=dresses, size=st.tuples(st.integers(64, 400), st.integers(64, 400)))
def test_headline_of_any_options_stays_inside_the_margins(
    text: str, dress: dict[str, Any], size: tuple[int, int]
) -> None:
    image = grey(*size)

    covered = changed(image, put(image, TextOverlay(text, **dress)))

    margin = MARGIN * min(size)
    assert min(covered.left, covered.top) >= margin
    assert covered.right <= size[0] - margin
    assert covered.bottom <= size[1] - margin


@pytest.mark.parametrize("size", [(64, 2048), (2048, 64), (64, 64), (9, 9), (1, 1)])
def test_headline_on_images_of_extreme_shapes_stays_inside_the_margins(size: tuple[int, int]) -> None:
    for text, wanted in product((TEXTS["Korean"], "W" * 60), (None, 0.5)):
        assert put(grey(*size), TextOverlay(text, size=wanted, shadow=True)).shape == (size[1], size[0], 3)


@settings(max_examples=EXAMPLES, deadline=None)
@given(text=texts, dress=dresses, room=st.tuples(st.integers(100, 500), st.integers(100, 500)))
@example(text="x\n" * 150, dress={"stroke": Stroke(0.125, None)}, room=(100, 342))
def test_no_letter_is_cut_at_the_rim_of_its_block(text: str, dress: dict[str, Any], room: tuple[int, int]) -> None:
    headline = prepare_headline(TextOverlay(text, **dress), FONT_DIRS)
    block = Typesetter(headline.overlay, headline.lines, headline.typeface).typeset(room, room)

    # Given the same lines drawn where there is room for more
    whole = 0
    for line in block.lines:
        canvas = Image.new("L", (room[0] + 400, 800))
        ImageDraw.Draw(canvas).text((200, 400), line, 255, block.font, "ls", stroke_width=block.stroke_px)
        whole += int(np.asarray(canvas, dtype=np.int64).sum())

    inside = np.asarray(replace(block, scale=1.0).letters(0.5, stroke_px=block.stroke_px), dtype=np.int64)
    assert inside.sum() >= 0.9 * whole  # lines that touch each other share ink
    # A crowd is scaled down as it is, to whole pixels each way: a column of 1.8 px becomes one of 1 px, as dense.
    scaled = np.asarray(block.letters(0.5, stroke_px=block.stroke_px))
    assert (scaled.shape[1], scaled.shape[0]) == block.ink_size
    assert scaled.mean() == pytest.approx(inside.mean(), rel=0.1)  # BOX takes whole pixels
    assert "".join("".join(block.lines).split()) == "".join("".join(headline.lines).split())


# --- where and how large


@pytest.mark.parametrize("position", Position)
def test_each_place_is_reached_by_the_ink(position: Position) -> None:
    image = grey()
    covered = changed(image, put(image, TextOverlay("Hxg 가\nHx", size=0.1, position=position)))
    across, down = position.fractions
    assert covered.left == pytest.approx(16 + (400 - 32 - covered.size[0]) * across, abs=1)
    assert covered.top == pytest.approx(16 + (400 - 32 - covered.size[1]) * down, abs=1)


@pytest.mark.parametrize(("position", "edge"), [(Position.TOP_LEFT, "left"), (Position.BOTTOM_RIGHT, "right")])
def test_lines_are_aligned_to_the_side_of_their_place(position: Position, edge: str) -> None:
    image = grey()
    after = put(image, TextOverlay("HHHHHH\nHH", size=0.1, position=position, colour="#ffffff"))
    covered = changed(image, after)
    middle = (covered.top + covered.bottom) // 2
    upper, lower = (changed(grey(400, len(rows)), rows) for rows in (after[:middle], after[middle:]))
    assert getattr(upper, edge) == getattr(lower, edge)
    assert lower.size[0] < upper.size[0] / 2


def test_a_size_is_that_fraction_of_the_height() -> None:
    image = grey(900, 1000)
    covered = changed(image, put(image, TextOverlay("H", "DejaVu Sans", size=0.2, position=Position.CENTER)))
    assert covered.size[1] == pytest.approx(200 * 0.729, abs=2)  # the height of capitals in DejaVu


@pytest.mark.parametrize("script", TEXTS)
def test_a_size_that_fits_is_large_but_leaves_two_thirds_of_the_image(script: str) -> None:
    image = grey(1024, 1024)
    covered = changed(image, put(image, TextOverlay(TEXTS[script])))
    assert 0.5 * 1024 <= covered.size[0] <= 0.9 * 1024
    assert 0.1 * 1024 <= covered.size[1] <= 1024 / 3


def test_headline_without_a_place_goes_to_the_quietest_region() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    pixels[350:560, 20:580] = 230
    image = Image.fromarray(pixels)
    covered = changed(image, put(image, TextOverlay(TEXTS["English"])))
    assert covered.top >= 350
    assert covered.bottom <= 560


def test_headline_shrinks_for_a_place_where_it_touches_nothing() -> None:
    # Given stripes below a calm part that is too low for the largest letters
    pixels = np.full((600, 600, 3), 230, dtype=np.uint8)
    pixels[145::8] = pixels[146::8] = pixels[147::8] = 40
    image = Image.fromarray(pixels)
    covered = changed(image, put(image, TextOverlay(TEXTS["English"])))
    assert covered.bottom <= 145
    assert covered.size[0] > 200


def test_headlines_keep_off_each_other_and_off_the_signature() -> None:
    image, style = grey(600, 600), SignatureStyle(Position.TOP_CENTER)
    signature = TextSignature("서울 아틀리에", FONT_DIRS)
    place = signature_rect(image.size, signature, style)
    assert place is not None
    overlays = (
        TextOverlay(TEXTS["Korean"]),
        TextOverlay(TEXTS["English"], size=0.08, position=Position.CENTER),
        TextOverlay(TEXTS["Japanese"]),
    )

    together = put(image, *overlays, avoid=(place,))

    # Then there is as much ink as of all apart, and none where the signature goes
    np.testing.assert_array_equal(together[place.top : place.bottom, place.left : place.right], 20)
    ink = [put(image, *some, avoid=(place,)) != 20 for some in combinations(overlays, 1)]
    assert (together != 20).sum() > 0.5 * sum(one.sum() for one in ink)
    signed = np.asarray(Image.open(io.BytesIO(sign(image, signature, style).encode_png())))
    assert changed(image, signed.astype(np.int16)) == pytest.approx(place, abs=3)


def test_absent_signature_has_no_place() -> None:
    assert signature_rect((100, 100), Unsigned(), SignatureStyle()) is None


def test_the_same_input_gives_the_same_bytes_and_the_image_is_left_alone() -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    before = image.tobytes()
    overlay = TextOverlay(TEXTS["Korean"], shadow=True, box=Box(None, 0.5))
    np.testing.assert_array_equal(put(image, overlay), put(image, overlay))
    assert image.tobytes() == before


# --- colours


def luminance(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the relative luminance of WCAG 2.2."""
    scaled = np.asarray(pixels, dtype=np.float64) / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ [0.2126, 0.7152, 0.0722])


def measured_contrast(image: Image.Image, after: NDArray[np.int16]) -> float:
    """Compute the least contrast between the letters and any pixel of their block that no letter touches."""
    differs = np.any(np.asarray(image) != after, axis=-1)
    inks = [differs & np.all(after == level, axis=-1) for level in (0, 255)]
    own, ink = max(zip((0.0, 1.0), inks, strict=True), key=lambda pair: int(pair[1].sum()))
    letters = Image.fromarray(ink.astype(np.uint8) * 255)
    left, top, right, bottom = letters.getbbox() or (0, 0, 0, 0)
    # Around the core of a letter lie the pixels that it half covers.
    ground = (np.asarray(letters.filter(ImageFilter.MaxFilter(7))) == 0)[top:bottom, left:right]
    lights = luminance(after[top:bottom, left:right][ground])
    ratio = (lights + 0.05) / (own + 0.05)
    assert ratio.size > 100
    return float(np.maximum(ratio, 1 / ratio).min())


@cache
def grounds() -> dict[str, Image.Image]:
    generator = np.random.default_rng(7)
    flat = {f"flat {level}": grey(level=level) for level in (0, 60, 110, 117, 118, 119, 125, 190, 255)}
    ramp = Image.linear_gradient("L").resize((400, 400))
    photo = Image.open(DEMO_MODEL / "grid-base.png").convert("RGB")
    return flat | {
        "colour": Image.new("RGB", (400, 400), (20, 140, 60)),
        "ramp": ramp.convert("RGB"),
        "ramp across": ramp.rotate(90).convert("RGB"),
        "half and half": Image.fromarray((np.indices((400, 400, 3))[1] >= 200).astype(np.uint8) * 255),
        "noise": Image.fromarray(generator.integers(0, 256, (400, 400, 3), dtype=np.uint8)),
        "coarse noise": Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((400, 400)),
        "photos": photo.crop((0, 0, 400, 400)),
        "another": photo.crop((60, 150, 320, 380)).resize((400, 400)),
    }


@pytest.mark.parametrize("position", [None, pytest.param(Position.CENTER, marks=long)])
@pytest.mark.parametrize("name", grounds())
def test_automatic_colour_has_a_contrast_of_at_least_4_5(name: str, position: Position | None) -> None:
    image = grounds()[name]
    for box in (None, Box(None, 0.2), Box("#808080", 0.3)):
        after = put(image, TextOverlay(TEXTS["English"], position=position, box=box))
        assert measured_contrast(image, after) >= 4.5


@settings(max_examples=EXAMPLES, deadline=None)
@given(colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_automatic_colour_has_that_contrast_on_any_colours(colours: list[tuple[int, int, int]], seed: int) -> None:
    choice = np.random.default_rng(seed).integers(0, len(colours), (25, 25))
    image = Image.fromarray(np.array(colours, dtype=np.uint8)[choice]).resize((300, 300), Image.Resampling.NEAREST)
    assert measured_contrast(image, put(image, TextOverlay("Sale today"))) >= 4.5


@pytest.mark.parametrize("level", [0, 255])
def test_black_or_white_with_enough_contrast_gets_no_box(level: int) -> None:
    # Every changed pixel lies between the ground and the colour of the letters: no panel, no outline
    image = grey(level=level)
    after = put(image, TextOverlay("H", "DejaVu Sans", position=Position.CENTER))
    ink = np.any(after != level, axis=-1)
    assert (after[ink] == 255 - level).all(axis=-1).mean() > 0.7


def test_an_outline_sets_letters_off_without_a_panel() -> None:
    image = grounds()["noise"]
    after = put(image, TextOverlay("HHH", size=0.2, stroke=Stroke(0.1, None), position=Position.CENTER))
    covered = changed(image, after)
    kept = np.all(after == np.asarray(image), axis=-1)[covered.top : covered.bottom, covered.left : covered.right]
    assert kept.mean() > 0.04


def test_given_colours_are_used_unchanged() -> None:
    overlay = TextOverlay(
        "HHH",
        size=0.2,
        colour="#ff0000",
        stroke=Stroke(0.1, "#00ff00"),
        box=Box("#0000ff", 1.0),
        position=Position.CENTER,
    )
    seen = {tuple(pixel) for pixel in put(grey(), overlay).reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= seen


def test_a_box_lets_through_what_its_opacity_says() -> None:
    after = put(grey(level=100), TextOverlay("H", colour="#ffffff", box=Box("#ff0000", 0.25), position=Position.CENTER))
    levels, counts = np.unique(after.reshape(-1, 3), axis=0, return_counts=True)
    panel = levels[np.argsort(counts)[-2]]
    assert panel == pytest.approx([139, 75, 75], abs=1)


def test_shadow_is_soft_and_falls_to_the_lower_right() -> None:
    image = grey(level=200)
    plain, shaded = (
        put(image, TextOverlay("H", size=0.3, colour="#ffffff", shadow=shadow, position=Position.CENTER))
        for shadow in (False, True)
    )
    darker = np.argwhere(shaded[..., 0] < 200)
    assert darker.mean(axis=0) == pytest.approx(np.argwhere(plain[..., 0] > 200).mean(axis=0) + 6, abs=4)
    assert len(np.unique(shaded)) > 20


# --- lines


def wide(text: str) -> float:
    """Return the width: one for an ideograph or a syllable, a half for a letter."""
    return sum(1.0 if ord(sign) > 0x1100 else 0.5 for sign in text)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        # Latin breaks at spaces, evenly
        ("The quick brown fox jumps over the lazy dog", 8, ["The quick brown", "fox jumps over", "the lazy dog"]),
        ("one two three four", 7, ["one two", "three four"]),
        # Hangul too, but inside a word that is wider than the line
        ("커피를 지금 만나 보세요", 6, ["커피를 지금", "만나 보세요"]),
        ("오늘 대한민국만세만세", 5, ["오늘 대", "한민국", "만세만세"]),
        # Japanese and Chinese between signs, if it must be; sooner behind a phrase
        ("日本語日本語日本語", 3, ["日本語"] * 3),
        ("全新咖啡馆，欢迎光临", 7, ["全新咖啡馆，", "欢迎光临"]),
        # Nothing begins a line that closes, and nothing ends one that opens
        ("漢字漢字。漢字", 4, ["漢字漢", "字。漢字"]),
        ("漢字漢「字」漢", 4, ["漢字漢", "「字」漢"]),
        ("きょうはきゃべつ", 5, ["きょうは", "きゃべつ"]),
        ("新作のコーヒー豆", 6, ["新作の", "コーヒー豆"]),
        # Two scripts
        ("iPhone用ケース", 5, ["iPhone用", "ケース"]),
    ],
)
def test_lines_break_by_the_habits_of_the_script(text: str, width: float, lines: list[str]) -> None:
    assert wrap(text, width, wide, Breaking.SYLLABLES) == lines


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab가나다漢字。「」っーカ "), min_size=1, max_size=40), st.integers(3, 12))
def test_no_line_is_wider_than_it_may_be_and_nothing_is_lost(text: str, width: int) -> None:
    line = " ".join(text.split()) or "a"
    lines = wrap(line, width, wide, Breaking.ALL)
    assert lines is not None
    assert "".join(lines).replace(" ", "") == line.replace(" ", "")
    assert all(wide(one) <= width for one in lines)


def test_unbreakable_word_is_not_broken() -> None:
    assert wrap("extraordinary", 4, wide, Breaking.SYLLABLES) is None
    assert wrap("대한민국만세", 4, wide, Breaking.WORDS) is None


def test_explicit_line_breaks_are_kept() -> None:
    headline = prepare_headline(TextOverlay("one\r\ntwo\n\n\n three  four \n\n"), FONT_DIRS)
    assert headline.lines == ("one", "two", "", "three four")
    block = Typesetter(headline.overlay, headline.lines, headline.typeface).typeset((800, 800), (800, 800))
    assert block.lines == headline.lines


@pytest.mark.parametrize("script", TEXTS)
def test_line_spacing_is_that_of_the_font(script: str) -> None:
    headline = prepare_headline(TextOverlay(f"{TEXTS[script][:2]}\n{TEXTS[script][:2]}", size=0.1), FONT_DIRS)
    block = Typesetter(headline.overlay, headline.lines, headline.typeface).typeset((1000, 1000), (1000, 1000))
    rows = np.asarray(block.letters(0.0)).max(axis=1) > 0
    assert (~rows).any()
    assert block.ink_size[1] > sum(block.font.getmetrics())


# --- what may be written


@pytest.mark.parametrize(
    "text", ["", " \n\u3000", "a\x00", "a\tb", "a\u202eb", "a\u2066b", "\u200b", "\ud800", "a\u2028b"]
)
def test_text_that_cannot_be_drawn_is_refused_by_the_name_of_its_field(text: str) -> None:
    with pytest.raises(OverlayInvalid, match=r"^text_overlay\[1\]: the text "):
        prepare_headlines((TextOverlay("fine"), TextOverlay(text)), FONT_DIRS)


def test_letters_that_leave_no_ink_are_refused() -> None:
    with pytest.raises(OverlayInvalid, match=r"^text_overlay: .*no visible character"):
        prepare_headlines((TextOverlay("\u3164"),), FONT_DIRS)


@pytest.mark.parametrize("text", ["Sale \U00012000", "Sale \U0001f389"])
def test_characters_no_font_has_are_named(text: str) -> None:
    with pytest.raises(FontMissing, match=rf"^text_overlay: no font in .* \(U\+{ord(text[-1]):X}\)"):
        prepare_headlines((TextOverlay(text),), FONT_DIRS)


def test_a_family_that_is_named_must_have_every_character_itself() -> None:
    with pytest.raises(FontMissing, match=r"the font DejaVu Sans .* '서' \(U\+C11C\) '울' \(U\+C6B8\)"):
        prepare_headline(TextOverlay("Seoul 서울", "DejaVu Sans"), FONT_DIRS)


def test_family_that_is_not_installed_is_refused_with_near_names() -> None:
    with pytest.raises(FontMissing, match=r"'Nanum Gotic' is installed; near it are NanumGothic, "):
        prepare_headline(TextOverlay("Sale", "Nanum Gotic"), FONT_DIRS)


# --- fonts


@pytest.mark.parametrize(
    ("name", "file", "index"),
    [
        ("NanumGothic", "NanumGothic.ttf", 0),
        ("nanum gothic", "NanumGothic.ttf", 0),
        ("나눔고딕", "NanumGothic.ttf", 0),
        ("나눔고딕 Bold", "NanumGothicBold.ttf", 0),
        ("Nanum Gothic Bold", "NanumGothicBold.ttf", 0),
        ("NanumSquare", "NanumSquareR.ttf", 0),
        ("NanumSquare Bold", "NanumSquareB.ttf", 0),
        ("DejaVu Sans", "DejaVuSans.ttf", 0),
        ("DejaVu Sans Regular", "DejaVuSans.ttf", 0),
        ("DejaVu Sans Mono Bold", "DejaVuSansMono-Bold.ttf", 0),
        ("VL ゴシック", "VL-Gothic-Regular.ttf", 0),
        ("WenQuanYi Micro Hei", "wqy-microhei.ttc", 0),
        ("文泉驿等宽微米黑", "wqy-microhei.ttc", 1),
    ],
)
def test_fonts_are_found_by_the_names_they_have(name: str, file: str, index: int) -> None:
    face = choose_typeface("Sale", name, FONT_DIRS)
    assert (face.path.name, face.index) == (file, index)


@pytest.mark.parametrize(
    ("script", "family"),
    [
        ("English", "DejaVu Sans"),
        ("Korean", "NanumSquare"),
        ("Japanese", "VL PGothic"),
        ("Chinese", "WenQuanYi Micro Hei"),
    ],
)
def test_each_script_has_a_font_of_its_own_country(script: str, family: str) -> None:
    assert choose_typeface(TEXTS[script], None, FONT_DIRS).family == family


def test_broken_fonts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.ttf").write_bytes(b"\x00\x01\x00\x00" + b"\xff" * 40)
    (tmp_path / "b.ttc").write_bytes(b"ttcf" + b"\x00\x01\x00\x00" + b"\xff" * 40)
    (tmp_path / "c.otf").write_bytes(b"")
    (tmp_path / "d.ttf").write_bytes(Path("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf").read_bytes()[:2000])
    assert list_typefaces((tmp_path,)) == ()


def test_scripts_of_a_font_are_found_by_their_coverage() -> None:
    dejavu, nanum = (choose_typeface("a", name, FONT_DIRS) for name in ("DejaVu Sans", "NanumGothic"))
    assert set(covered_scripts(code_points(dejavu.path))) == {Script.LATIN}
    assert covered_scripts(code_points(nanum.path))[Script.HANGUL] == 11172


def test_the_command_lists_families_styles_and_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FONT_DIRS", "/usr/share/fonts")
    monkeypatch.setenv("COLUMNS", "160")

    table, lines = (CliRunner().invoke(app, ["fonts", *options]).stdout for options in ([], ["--json"]))

    assert re.search(r"^NanumGothic +나눔고딕 +Regular, Bold +Latin, Hangul, Kana, Han *$", table, re.MULTILINE)
    families = {family["family"]: family for family in map(json.loads, lines.splitlines())}
    dejavu = families["DejaVu Sans"]  # of which a machine may have more than we ask for
    assert (dejavu["family"], list(dejavu["scripts"])) == ("DejaVu Sans", ["Latin"])
    assert {"Book", "Bold"} <= set(dejavu["styles"])
    assert families["WenQuanYi Micro Hei"]["scripts"]["Han"] > 20_000

    monkeypatch.setenv("FONT_DIRS", str(tmp_path))
    none = CliRunner().invoke(app, ["fonts"])
    assert (none.exit_code, "no fonts in" in none.stdout) == (1, True)


def test_a_font_that_draws_nothing_for_a_character_it_claims_to_have_is_passed_over() -> None:
    # NanumSquare, the first choice for Hangul, has such a one; the others of its family write it.
    headline = prepare_headline(TextOverlay("\ud7a3"), FONT_DIRS)

    assert headline.typeface.family.startswith("Nanum")
    assert is_visible("\ud7a3", headline.typeface.path, headline.typeface.index)
