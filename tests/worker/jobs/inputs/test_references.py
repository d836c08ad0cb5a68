"""The pictures a job brings: read whatever they are, or refused in words that say why; and fitted to what is drawn."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from config.model import DEFAULT_MODEL
from config.store import StoreSettings
from inference.request import Control, ModelFacts, Reference, Source
from tests.support.long import long
from tests.watermark.test_decoding import noise, png, png_chunks, png_header
from tests.worker.messages.test_kinds import INIT, MASK, job_of, rules
from watermark.decoding import ImageMode, decode_image
from watermark.errors import ImageInvalid, ImageTooLarge, WatermarkError
from watermark.resizing import Fit, fit
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate
from worker.errors import JobFailed
from worker.jobs.handler import request_of
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.references import References, check_mask, check_supported, output_size, shrunk
from worker.jobs.inputs.store_source import StoreSource
from worker.messages.job import JobControl, JobSource, Kind, Preprocess, resolve_size
from worker.messages.rules import JobRules

__all__ = ["rules"]

FACTS = ModelFacts(
    model="tiny",
    family="stable-diffusion",
    base_size=512,
    size_multiple=8,
    default_steps=50,
    default_guidance=7.5,
    schedulers=("ddim",),
    device="cpu",
    dtype="float32",
    load_seconds=1.0,
    step_seconds=0.1,
    kinds=("text2image", "image2image"),
    controls=("edges",),
)


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return png(image, exif=exif)


# --- Decoding


@pytest.mark.parametrize(
    ("content", "mode", "colour"),
    [
        pytest.param(png(Image.new("RGB", (4, 4), (10, 20, 30))), "RGB", (10, 20, 30), id="rgb"),
        pytest.param(png(Image.new("RGBA", (4, 4), (10, 20, 30, 0))), "RGB", (255, 255, 255), id="clear is white"),
        pytest.param(png(Image.new("RGBA", (4, 4), (255, 255, 255, 0))), "L", 0, id="but black in a mask"),
        pytest.param(png(Image.new("RGBA", (4, 4), (9, 9, 9, 99))), "RGBA", (9, 9, 9, 99), id="alpha kept"),
        pytest.param(png(Image.new("RGB", (4, 4), (9, 9, 9))), "RGBA", (9, 9, 9, 255), id="alpha made"),
        pytest.param(png(Image.fromarray(np.full((4, 4), 0x8040, np.uint16))), "L", 128, id="16 bits"),
        pytest.param(png(Image.new("1", (4, 4), 1)), "L", 255, id="1 bit"),
        pytest.param(png(Image.new("CMYK", (16, 16)), format="JPEG"), "RGB", (255, 255, 255), id="cmyk"),
        pytest.param(png(Image.new("RGB", (4, 4)), format="WEBP", lossless=True), "RGB", (0, 0, 0), id="webp"),
    ],
)
def test_every_kind_of_pixel_becomes_the_requested_mode(content: bytes, mode: ImageMode, colour: Any) -> None:
    image = decode_image(content, mode)

    assert (image.mode, image.info) == (mode, {})
    assert image.getpixel((0, 0)) == colour


def test_camera_image_is_turned_upright() -> None:
    image = Image.new("RGB", (40, 20))
    image.putpixel((0, 0), (255, 0, 0))

    upright = decode_image(turned(image, 6), "RGB")

    assert upright.size == (20, 40)
    assert upright.getpixel((19, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", pytest.param("RGBA", marks=long)])
def test_an_image_larger_than_is_useful_comes_out_smaller_and_upright(mode: ImageMode) -> None:
    image = Image.new(mode, (4200, 5000), (90, 60, 30))
    image.paste((255, 0, 0), (0, 0, 400, 400))

    upright = decode_image(turned(image, 6), mode)

    assert upright.size == (2500, 2100)
    assert upright.getpixel((2490, 9))[:3] == (255, 0, 0)  # type: ignore[index]
    assert upright.info == {}


def test_a_jpeg_of_100_megapixels_is_read_at_a_part_of_its_size() -> None:
    content = png(Image.new("RGB", (12_000, 8_400), (200, 100, 50)), format="JPEG")

    image = decode_image(content, "RGB")

    assert image.size == (3000, 2100)
    assert max(abs(a - b) for a, b in zip(image.getpixel((9, 9)), (200, 100, 50), strict=True)) < 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        pytest.param(
            png_chunks(png_header(10_000, 10_000), (b"IDAT", b""), (b"IEND", b"")),
            ImageTooLarge,
            "10000x10000 px, 100 Mpx; at most 25",
            id="100 Mpx png",
        ),
        pytest.param(
            png_chunks(png_header(20_000_000, 1), (b"IDAT", b""), (b"IEND", b"")),
            ImageTooLarge,
            "20000000x1 px; at most 65535 px",
            id="one endless row",
        ),
        pytest.param(
            png(Image.new("L", (6000, 5000)), format="JPEG", progressive=True),
            ImageTooLarge,
            "6000x5000 px, 30 Mpx",
            id="progressive jpeg",
        ),
        pytest.param(
            png_chunks(png_header(65_535, 65_535), (b"IDAT", b""), (b"IEND", b"")),
            ImageInvalid,
            "far too large",
            id="header bomb",
        ),
        pytest.param(b"<!doctype html>", ImageInvalid, "a web page", id="web page"),
        pytest.param(b"", ImageInvalid, "an empty file", id="empty"),
        pytest.param(png(noise())[:5000], ImageInvalid, "a PNG image that is broken", id="cut off"),
        pytest.param(
            png(noise(), save_all=True, append_images=[Image.new("RGB", (200, 100))], format="WEBP"),
            ImageInvalid,
            "the picture is an animation",
            id="animation",
        ),
    ],
)
def test_invalid_or_too_large_image_is_refused_with_a_plain_message(
    content: bytes, error: type[WatermarkError], words: str
) -> None:
    with pytest.raises(error, match=words):
        decode_image(content, "RGB")


# --- Fitting


def gradient(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("how", list(Fit))
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (8, 200)])
def test_fitted_image_has_the_requested_size(mode: str, how: Fit, size: tuple[int, int]) -> None:
    fitted = fit(gradient(100, 50).convert(mode), size, how)

    assert (fitted.size, fitted.mode) == (size, mode)


@pytest.mark.parametrize("how", list(Fit))
@pytest.mark.parametrize("strip", [(2000, 1), (1, 2000)])
def test_a_strip_thinner_than_a_pixel_of_the_drawing_fits_as_well(strip: tuple[int, int], how: Fit) -> None:
    fitted = fit(Image.new("RGB", strip, "red"), (512, 256), how)

    assert fitted.size == (512, 256)
    assert fitted.getextrema() == ((255, 255), (0, 0), (0, 0))


def test_cover_cuts_off_and_contain_shows_all_and_goes_on() -> None:
    halves = Image.new("RGB", (200, 100), (255, 0, 0))
    halves.paste((0, 0, 255), (100, 0, 200, 100))
    halves.paste((0, 255, 0), (0, 0, 40, 100))

    covered, contained = fit(halves, (100, 100), Fit.COVER), fit(halves, (100, 100), Fit.CONTAIN)

    assert not (np.asarray(covered) == (0, 255, 0)).all(axis=2).any()
    assert contained.getpixel((5, 50)) == contained.getpixel((5, 5)) == (0, 255, 0)
    assert contained.getpixel((95, 99)) == (0, 0, 255)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = noise(64, 64)

    assert fit(image, (64, 64), Fit.CONTAIN).tobytes() == image.tobytes()


# --- Masks


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 50), (1000, 505)])
def test_a_mask_may_be_of_another_size_than_its_image(width: int, height: int) -> None:
    check_mask(Image.new("L", (width, height), 255), (200, 100))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Image.new("L", (100, 100), 255), "the mask is 100x100 px and the picture 200x100"),
        (Image.new("L", (200, 100), 127), "nothing in the mask is white"),
    ],
)
def test_a_mask_that_does_not_go_with_its_image_is_refused_by_name(mask: Image.Image, words: str) -> None:
    with pytest.raises(JobFailed, match=f"mask_path: {words}") as refusal:
        check_mask(mask, (200, 100))

    assert refusal.value.code == "IMAGE_INVALID"


# --- What the engine is told


def test_the_engine_gets_images_of_the_drawing_s_size_and_a_mask_without_greys(rules: JobRules) -> None:
    job = job_of(rules, kind="inpaint", **INIT, **MASK, strength=0.5)
    mask = Image.linear_gradient("L").resize((100, 50))

    source = References(noise(200, 100), mask).source_for(job, (64, 32))

    assert isinstance(source, Source)
    assert (len(source.rgb), source.strength) == (64 * 32 * 3, 0.5)
    assert source.mask is not None
    assert (len(source.mask), set(source.mask)) == (64 * 32, {0, 255})


def test_engine_control_has_the_job_s_parameters(rules: JobRules) -> None:
    control = {"image_path": "e", "model": "edges", "scale": 0.5, "start": 0.2, "end": 0.7, "preprocess": "canny"}
    job = job_of(rules, control=control)

    engine_control = References(control=noise(64, 64)).control_for(job, (64, 64))

    assert engine_control == Control("edges", noise(64, 64).tobytes(), 0.5, 0.2, 0.7, finds_edges=True)


def source_with(settings: StoreSettings, bucket: str, images: Mapping[str, Image.Image]) -> StoreSource:
    """Store the images; return where jobs fetch them."""
    storage, is_draining = Storage(settings), Event()
    for key, image in images.items():
        storage.put(ObjectRef(bucket, key), png(image), content_type="image/png")
    return StoreSource(
        storage=storage,
        cache=DownloadCache(storage, settings.cache_dir, 10_000_000),
        private_bucket=bucket,
        is_draining=is_draining,
        gate=StoreGate(Breaker("the store", STORE_THRESHOLD), is_draining),
    )


def test_references_are_reduced_to_the_drawing_s_size_and_keep_their_proportions(
    rules: JobRules, store_settings: StoreSettings, bucket: str
) -> None:
    """A dozen jobs with a camera's pictures would take half a gigabyte."""
    images = {"i.png": noise(1201, 801), "m.png": Image.new("L", (600, 400), 255), "c.png": noise()}
    source = source_with(store_settings, bucket, images)
    fetcher = Fetcher(source, font_dirs=(), facts={DEFAULT_MODEL: FACTS})
    at = partial(ObjectRef, bucket)
    job = replace(
        job_of(rules),
        kind=Kind.INPAINT,
        source=JobSource(at("i.png"), at("m.png"), 1.0),
        control=JobControl(at("c.png"), "edges", 1.0, 0.0, 1.0, Preprocess.NONE),
    )

    with ExitStack() as pinned:
        found = fetcher.fetch_inputs(job, pinned).references

    assert found.proportions == (1201, 801)
    size = output_size(job, FACTS, found.proportions)
    assert [one.size for one in (found.init, found.mask, found.control) if one] == [size] * 3
    assert request_of(job, (), FACTS, found).source == References(
        noise(1201, 801), Image.new("L", (9, 6), 255)
    ).source_for(job, size)


def test_edit_s_references_keep_their_shape_up_to_a_megapixel(
    rules: JobRules, store_settings: StoreSettings, bucket: str
) -> None:
    source = source_with(store_settings, bucket, {"a.png": noise(1500, 1000), "b.png": noise(100, 70)})
    job = replace(
        job_of(rules),
        kind=Kind.EDIT,
        references=(ObjectRef(bucket, "a.png"), ObjectRef(bucket, "b.png")),
    )

    with ExitStack() as pinned:
        found = Fetcher(source, font_dirs=(), facts={DEFAULT_MODEL: FACTS}).fetch_inputs(job, pinned).references
    request = request_of(job, (), FACTS, found)

    large = noise(1500, 1000).resize((1254, 836), Image.Resampling.LANCZOS)
    assert request.references == (
        Reference(1254, 836, large.tobytes()),
        Reference(100, 70, noise(100, 70).tobytes()),
    )
    assert (request.kind, request.source, request.width, request.height) == ("edit", None, 624, 416)


@pytest.mark.parametrize("size", [(63, 100), (100, 63), (801, 100), (100, 801)])
def test_strip_or_thumbnail_is_refused_as_a_reference(size: tuple[int, int]) -> None:
    with pytest.raises(JobFailed, match="64 px and more on a side, up to 8 to 1") as refusal:
        shrunk(noise(*size))

    assert refusal.value.code == "IMAGE_INVALID"


def test_job_without_references_has_none(rules: JobRules) -> None:
    none = References()

    assert (none.source_for(job_of(rules), (8, 8)), none.control_for(job_of(rules), (8, 8))) == (None, None)
    assert none.proportions is None


@pytest.mark.parametrize(
    ("fields", "reference", "size"),
    [
        ({}, (3000, 2000), (624, 416)),
        ({}, (2000, 3000), (416, 624)),
        ({}, (9000, 1000), (1024, 256)),
        ({}, None, (512, 512)),
        ({"aspect_ratio": "1:1"}, (3000, 2000), (512, 512)),
        ({"width": 256, "height": 512}, (3000, 2000), (256, 512)),
    ],
)
def test_an_image_has_its_reference_s_proportions_unless_the_job_names_some(
    rules: JobRules, fields: dict[str, Any], reference: tuple[int, int] | None, size: tuple[int, int]
) -> None:
    job = job_of(rules, **fields)

    assert resolve_size(job, base_size=512, size_multiple=8, reference=reference) == size


# --- What the model cannot do


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "edit", "references": [{"image_path": "a"}]}, "kind edit: the loaded model tiny can only text2image"),
        ({"kind": "inpaint", **INIT, **MASK}, "the loaded model tiny can only text2image, image2image"),
        (
            {"control": {"image_path": "e", "model": "pose"}},
            "'pose' is not known: this worker knows edges",
        ),
    ],
)
def test_unsupported_kind_is_refused_with_the_supported_ones(
    rules: JobRules, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(JobFailed, match=words) as refusal:
        check_supported(job_of(rules, **fields), FACTS)

    assert refusal.value.code == "UNSUPPORTED_BY_MODEL"


def test_supported_kind_is_accepted(rules: JobRules) -> None:
    check_supported(job_of(rules), FACTS)
    check_supported(job_of(rules, kind="image2image", **INIT), FACTS)
    check_supported(job_of(rules, control={"image_path": "e", "model": "edges"}), FACTS)


def test_control_is_refused_by_a_worker_without_controlnets(rules: JobRules) -> None:
    job = job_of(rules, control={"image_path": "e", "model": "edges"})

    with pytest.raises(JobFailed, match="this worker has no ControlNets"):
        check_supported(job, replace(FACTS, controls=()))
