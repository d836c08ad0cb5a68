"""Cutting out, placing, composing, protecting and finding a product: pure, and rembg for real."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw, ImageFilter

from config.images import ImageSettings
from config.section import SettingsError, load_section
from tests.support.images.products import bottle, protected_part, scene
from tests.support.long import long
from tests.support.models.onnx_files import write_dark_finder
from tests.support.paths import ROOT
from tests.support.world import eventually, shadow_modules
from watermark.geometry import Position, Rect
from watermark.product.compositing import compose
from watermark.product.cutout import MAX_SIDE_PX, CutoutFailed, has_transparency, trim
from watermark.product.cutout import check_cutout as is_cut_out
from watermark.product.masks import product_mask, repaint_mask, restore_masked
from watermark.product.placement import Layout, fitted_size, place_product
from watermark.product.template_match import match_template
from worker.cli.check.checks import CheckFailed
from worker.cli.check.models import check_cutout
from worker.errors import CuttingFailed, JobFailed
from worker.jobs.disposition import Disposition, decide
from worker.product.cutter import Cutter

FIELD = "product.image_path"
SIZES = [(128, 128), (512, 512), (640, 256), (200, 800)]
EVERYWHERE = [None, *Position]


def wanted() -> None:
    """Continue the job."""


def pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(image).astype(np.int16)


def photo(side: int = 400) -> Image.Image:
    """Draw a dark disc on white, its edge as soft as a lens's, with an opaque alpha channel."""
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side * 0.3, side * 0.2, side * 0.7, side * 0.8), fill=(110, 20, 30))
    return image.filter(ImageFilter.GaussianBlur(2)).convert("RGBA")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dark_finder(tmp_path_factory.mktemp("onnx") / "dark.onnx")


# Cutting out


def test_product_s_own_alpha_cuts_it_out_and_crops_it() -> None:
    image = Image.new("RGBA", (500, 500))
    image.paste(bottle(), (200, 90))

    cut = Cutter(None).cut(image, FIELD, wanted)

    assert cut.tobytes() == bottle().tobytes()


def test_opaque_alpha_counts_as_none() -> None:
    almost = Image.new("RGBA", (10, 10), (1, 2, 3, 250))

    assert not has_transparency(almost)
    assert has_transparency(bottle())


def test_a_huge_cut_out_is_made_as_small_as_any_image() -> None:
    assert max(trim(Image.new("RGBA", (3000, 300), "red")).size) == MAX_SIDE_PX


def test_product_without_alpha_and_model_is_refused_with_advice() -> None:
    with pytest.raises(
        JobFailed, match=r"product\.image_path has no alpha and .* CUTOUT_MODEL: send .*cutout_path"
    ) as caught:
        Cutter(None).cut(photo(), FIELD, wanted)

    assert caught.value.code == "UNSUPPORTED_BY_MODEL"


@pytest.mark.parametrize("empty", [Image.new("RGBA", (60, 60)), Image.new("RGBA", (60, 60), (9, 9, 9, 5))])
def test_fully_transparent_image_is_refused(empty: Image.Image) -> None:
    with pytest.raises(JobFailed, match=r"product\.image_path: all of it is transparent") as caught:
        Cutter(None).cut(empty, FIELD, wanted)

    assert caught.value.code == "IMAGE_INVALID"
    with pytest.raises(CutoutFailed):
        trim(empty)


def test_rembg_cuts_out_the_detected_product_and_removes_the_background_from_its_edge(model: Path) -> None:
    cut = Cutter(model).cut(photo(), FIELD, wanted)

    assert abs(cut.width - 160) <= 8
    assert abs(cut.height - 240) <= 8
    middle = pixels(cut)[cut.height // 2, cut.width // 2]
    assert (np.abs(middle - [110, 20, 30, 255]) <= 2).all()
    # As the picture shows it, the edge is half of the white that was behind it.
    edge = (pixels(cut)[..., 3] > 60) & (pixels(cut)[..., 3] < 200)
    assert edge.sum() > 100
    assert pixels(cut)[edge][:, 1].mean() < 60


@long
def test_isnet_model_gets_its_own_input_size(tmp_path: Path) -> None:
    cut = Cutter(write_dark_finder(tmp_path / "isnet.onnx", side=1024)).cut(photo(), FIELD, wanted)

    assert abs(cut.width - 160) <= 8


@pytest.mark.parametrize(
    ("mask", "said"), [("#ffffff00", "no product was found in it"), ("#ffffffff", "nothing was found around")]
)
def test_image_without_a_detected_product_or_background_is_refused(mask: str, said: str) -> None:
    with pytest.raises(CutoutFailed, match=said):
        is_cut_out(Image.new("RGBA", (90, 90), mask))


def test_invalid_model_is_retried_and_reported_in_a_folder_of_modules_with_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a working folder whose modules have our names, which do not disturb the cutter."""
    shadow_modules(tmp_path)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckFailed, match="CUTOUT_MODEL") as checked:
        check_cutout(ImageSettings.model_validate({"CUTOUT_MODEL": str(tmp_path / "json.py")}))

    failed = checked.value.__cause__
    assert isinstance(failed, CuttingFailed)
    assert "INVALID_PROTOBUF" in str(failed)
    assert decide(failed, attempt=1).disposition is Disposition.RETRY
    assert "cutting the product out failed 5 times" in decide(failed, attempt=5).message


def test_hanging_cutter_ends_at_its_deadline(tmp_path: Path) -> None:
    fifo = tmp_path / "never.onnx"
    os.mkfifo(fifo)  # whoever opens it to read waits for a writer
    began_at = time.monotonic()

    with pytest.raises(CuttingFailed, match="within 1 s"):
        Cutter(fifo, deadline_seconds=1).cut(photo(), FIELD, wanted)

    assert time.monotonic() - began_at < 120


def test_cutter_process_ends_with_a_killed_worker(tmp_path: Path) -> None:
    fifo = tmp_path / "never.onnx"
    os.mkfifo(fifo)
    code = (
        "import sys; from pathlib import Path; from PIL import Image; from worker.product.cutter import Cutter;"
        " Cutter(Path(sys.argv[1])).cut(Image.new('RGBA', (9, 9), 'red'), '', lambda: None)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(fifo)], cwd=ROOT) as worker:
        killed = psutil.Process(worker.pid)
        eventually(lambda: bool(killed.children()))
        (cutting,) = killed.children()
        eventually(lambda: "worker.product.cutter_process" in cutting.cmdline())
        worker.kill()

    assert psutil.wait_procs([cutting], timeout=120)[1] == []


def test_cancelled_job_does_not_wait_for_its_cutout(tmp_path: Path) -> None:
    fifo = tmp_path / "never.onnx"
    os.mkfifo(fifo)

    def cancelled() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Cutter(fifo).cut(photo(), FIELD, cancelled)


def test_missing_cutout_model_is_a_settings_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUTOUT_MODEL", str(tmp_path / "none.onnx"))

    with pytest.raises(SettingsError, match=r"CUTOUT_MODEL: .*none\.onnx is no file"):
        load_section(ImageSettings)


def test_check_runs_the_cutout_model(model: Path) -> None:
    assert "cuts out, in" in check_cutout(ImageSettings.model_validate({"CUTOUT_MODEL": str(model)}))
    assert "alpha of their own" in check_cutout(ImageSettings.model_validate({}))


# Placing


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("position", EVERYWHERE)
def test_a_product_never_leaves_the_image_and_keeps_its_proportions(
    size: tuple[int, int], position: Position | None
) -> None:
    background = scene(size)
    for scale in (0.05, 0.6, 1.0):
        for product in ((100, 300), (300, 100), (7, 2000)):
            at = place_product(background, product, Layout(scale, position))

            assert 0 <= at.left < at.right <= size[0]
            assert 0 <= at.top < at.bottom <= size[1]
            share = max(at.size[0] / size[0], at.size[1] / size[1])
            assert share == pytest.approx(scale, abs=1 / min(size))
            assert at.size[0] == pytest.approx(at.size[1] * product[0] / product[1], abs=1)


@pytest.mark.parametrize(("busy", "low", "high"), [("left", 0.6, 0.9), ("right", 0.1, 0.4), ("nowhere", 0.45, 0.55)])
def test_auto_placement_is_in_the_middle_of_the_quiet_side(busy: str, low: float, high: float) -> None:
    at = place_product(scene((600, 400), busy=busy), (100, 300), Layout(0.6, None))

    assert low < (at.left + at.right) / 2 / 600 < high
    assert at.bottom > 400 * 0.8


def test_auto_placement_leaves_a_margin() -> None:
    at = place_product(scene((600, 400), busy="right"), (100, 100), Layout(0.73, None))

    assert at.size == (292, 292)
    assert at.left == 20


def test_anchors_place_the_product() -> None:
    at = {position: place_product(scene((400, 400)), (100, 200), Layout(0.5, position)) for position in Position}

    assert at[Position.TOP_LEFT] == Rect(20, 20, 120, 220)
    assert at[Position.CENTER] == Rect(150, 100, 250, 300)
    assert at[Position.BOTTOM_RIGHT] == Rect(280, 180, 380, 380)


# Composing


@pytest.mark.parametrize("position", EVERYWHERE)
def test_composite_is_the_product_where_opaque_and_the_background_far_from_it(
    position: Position | None,
) -> None:
    background, product = scene((400, 300)), bottle(500)
    at = place_product(background, product.size, Layout(0.6, position))

    made = compose(background, product, at, shadow=0.8)

    placed = pixels(product.convert("RGBa").resize(at.size, Image.Resampling.LANCZOS).convert("RGBA"))
    opaque = placed[..., 3] == 255
    assert opaque.any()
    assert (pixels(made.crop(at))[opaque] == placed[opaque][:, :3]).all()
    far = np.ones((300, 400), bool)
    far[max(0, at.top - 80) : at.bottom + 80, max(0, at.left - 80) : at.right + 80] = False
    assert (pixels(made)[far] == pixels(background)[far]).all()


@pytest.mark.parametrize("position", [Position.TOP_LEFT, Position.BOTTOM_RIGHT, Position.CENTER])
def test_shadow_only_darkens_and_is_absent_when_off(position: Position) -> None:
    background, clear = scene((400, 300)), Image.new("RGBA", (60, 120))
    at = place_product(background, (60, 120), Layout(0.5, position))
    solid = Image.new("RGBA", (60, 120), "white")

    shaded = pixels(compose(background, solid, at, shadow=0.7)) - pixels(background)
    outside = np.ones((300, 400), bool)
    outside[at.top : at.bottom, at.left : at.right] = False

    assert (shaded[outside] <= 0).all()
    assert shaded[outside].min() < -40
    assert compose(background, clear, at, shadow=0.7).tobytes() == background.tobytes()
    unshaded = pixels(compose(background, solid, at, shadow=0))
    assert (unshaded[outside] == pixels(background)[outside]).all()


def test_the_same_input_gives_the_same_bytes() -> None:
    once, again = (
        compose(
            scene((300, 300)), bottle(), place_product(scene((300, 300)), (100, 300), Layout(0.7, None)), shadow=0.5
        )
        for _ in range(2)
    )

    assert once.tobytes() == again.tobytes()


# Protecting


@pytest.mark.parametrize("size", [(128, 128), (512, 384)])
def test_a_product_survives_refining_inside_its_eroded_mask_and_the_rest_is_refined(size: tuple[int, int]) -> None:
    background, product = scene(size), bottle()
    at = place_product(background, product.size, Layout(0.7, None))
    composite = compose(background, product, at, shadow=0.5)
    mask = product_mask(size, product, at)
    refined = Image.eval(composite, lambda value: 255 - value)

    restored = restore_masked(refined, composite, mask)

    inner, outside = protected_part(mask), np.asarray(mask) == 0
    assert inner.sum() > 0.5 * (np.asarray(mask) > 0).sum()
    assert (pixels(restored)[inner] == pixels(composite)[inner]).all()
    assert (pixels(restored)[outside] == pixels(refined)[outside]).all()
    assert (np.asarray(repaint_mask(mask))[np.asarray(mask) > 0] == 0).all()
    assert np.asarray(repaint_mask(mask)).mean() > 100


# Finding


@pytest.mark.parametrize("size", [(128, 128), (900, 600)])
@pytest.mark.parametrize("position", EVERYWHERE)
def test_product_is_located_where_it_was_placed(size: tuple[int, int], position: Position | None) -> None:
    background, product = scene(size), bottle()
    at = place_product(background, product.size, Layout(0.5, position))
    composite = compose(background, product, at, shadow=0.5)

    assert match_template(composite, product, fitted_size(size, product.size, 0.5)) == at


def test_absent_product_is_not_located() -> None:
    assert match_template(scene((400, 400)), bottle(), fitted_size((400, 400), (100, 300), 0.5)) is None
