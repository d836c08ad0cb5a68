"""Every kind of job through a whole worker: they share its batches, and what cannot be done is said by its field."""

from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.support.contract_schemas import assert_webhook_fits
from tests.support.images.parity import psnr
from tests.support.world import Worker, World

ORANGE, BLUE = (240, 140, 40), (60, 90, 200)


def png(image: Image.Image, **options: Any) -> bytes:
    content = BytesIO()
    image.save(content, **{"format": "PNG"} | options)
    return content.getvalue()


def ball(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Draw an orange disc on blue."""
    across, down = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    inside = (across**2 + down**2 < 0.5)[..., None]
    return Image.fromarray(np.where(inside, ORANGE, BLUE).astype(np.uint8))


def left_half(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Draw a mask: white on the left, black on the right."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture(scope="module", autouse=True)
def _uploaded(world: World) -> None:
    world.upload_demo_adapter("neon")
    world.upload("uploads/ball.png", png(ball()))
    world.upload("uploads/mask.png", png(left_half()))


def rgb(world: World, generation_id: int) -> Image.Image:
    return world.image(generation_id).convert("RGB")


JOBS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a red fox"},
    "near": {"kind": "image2image", "init_image_path": "uploads/ball.png", "strength": 0.25, "prompt": "an orange"},
    "far": {"kind": "image2image", "init_image_path": "uploads/ball.png", "prompt": "neon: a planet"},
    "inpaint": {
        "kind": "inpaint",
        "init_image_path": "uploads/ball.png",
        "mask_path": "uploads/mask.png",
        "prompt": "a red apple",
    },
    "control": {
        "prompt": "a planet",
        "control": {"image_path": "uploads/ball.png", "model": "edges", "preprocess": "canny", "end": 0.8},
    },
    "both": {
        "kind": "image2image",
        "init_image_path": "uploads/ball.png",
        "prompt": "a basketball",
        "control": {"image_path": "uploads/ball.png", "model": "edges"},
    },
    "headline": {"prompt": "a rocket on a blue background", "text_overlay": {"text": "출발", "position": "auto"}},
    "preset": {"prompt": "a cup of coffee", "style": "watercolor", "industry": "cafe"},
}


class MixedBatch(NamedTuple):
    """The generation of each job, and what drawing them took: forwards, and the lanes in them."""

    ids: dict[str, int]
    num_forwards: float
    num_lane_steps: float


@pytest.fixture(scope="module")
def mixed_batch(world: World, worker: Worker) -> MixedBatch:
    """Publish the jobs together, and wait until all are complete."""
    counters = ("darkroom_denoise_steps_total", "darkroom_denoise_lane_steps_total")
    before = [worker.metric(name) for name in counters]
    ids = {}
    for seed, (name, fields) in enumerate(JOBS.items()):
        own = {"lora_path": "models/neon.safetensors"} if fields["prompt"].startswith("neon") else {}
        ids[name] = world.publish(**fields, **own, seed=seed, num_inference_steps=8 + seed % 3)
    for name, generation_id in ids.items():
        end = world.wait_for_end(generation_id)
        assert end.kind == "complete", (name, end.body)
    return MixedBatch(ids, *(worker.metric(name) - one for name, one in zip(counters, before, strict=True)))


@pytest.fixture
def drawn(mixed_batch: MixedBatch) -> dict[str, int]:
    return mixed_batch.ids


def test_jobs_of_every_kind_complete_once_and_share_forwards(world: World, mixed_batch: MixedBatch) -> None:
    assert all(len(world.backend.ends(generation_id)) == 1 for generation_id in mixed_batch.ids.values())
    assert mixed_batch.num_lane_steps > 1.5 * mixed_batch.num_forwards
    world.wait_until_clean()


def test_a_restyled_image_is_nearer_to_its_reference_the_lower_the_strength(
    world: World, drawn: dict[str, int]
) -> None:
    near, far = (psnr(rgb(world, drawn[name]), ball()) for name in ("near", "far"))

    assert near > 12
    assert near > far + 3


def test_a_repainted_image_is_what_it_was_where_the_mask_is_black(world: World, drawn: dict[str, int]) -> None:
    before, after = np.asarray(ball(), int), np.asarray(rgb(world, drawn["inpaint"]), int)

    assert (after[:, 68:] == before[:, 68:]).all()
    assert abs(after[:, :60] - before[:, :60]).mean() > 10


def test_webhook_returns_the_job_s_parameters(world: World, drawn: dict[str, int]) -> None:
    metadata = {name: world.wait_for_end(generation_id).body["metadata"] for name, generation_id in drawn.items()}

    assert {name: one.get("kind", "text2image") for name, one in metadata.items()} == {
        name: fields.get("kind", "text2image") for name, fields in JOBS.items()
    }
    assert (metadata["preset"]["style"], metadata["preset"]["industry"]) == ("watercolor", "cafe")
    assert metadata["near"]["steps"] == 9


def test_every_webhook_of_the_kinds_fits_the_published_schemas(world: World, drawn: dict[str, int]) -> None:
    calls = [call for generation_id in drawn.values() for call in world.backend.calls(generation_id=generation_id)]

    for call in calls:
        assert_webhook_fits(call.kind, call.body, call.headers)
    assert {call.kind for call in calls} == {"progress", "complete"}


@pytest.mark.parametrize(
    ("reference", "fields", "size"),
    [
        (ball((300, 200)), {}, (160, 104)),
        (ball((300, 200)), {"fit": "contain", "aspect_ratio": "1:1"}, (128, 128)),
        (ball((900, 100)), {"width": 128, "height": 64}, (128, 64)),
    ],
    ids=["its proportions", "all of it", "cut"],
)
def test_a_reference_of_another_size_is_fitted(
    world: World, reference: Image.Image, fields: dict[str, Any], size: tuple[int, int]
) -> None:
    path = world.upload("uploads/other.jpg", png(reference, format="JPEG"))

    generation_id = world.publish(
        kind="image2image", init_image_path=path, strength=0.3, num_inference_steps=4, **fields
    )

    assert world.wait_for_end(generation_id).kind == "complete"
    assert world.image(generation_id).size == size


INIT: dict[str, Any] = {"kind": "image2image", "init_image_path": "uploads/ball.png"}
MASKED = INIT | {"kind": "inpaint"}


def control(**fields: Any) -> dict[str, Any]:
    return {"control": {"image_path": "uploads/ball.png", "model": "edges"} | fields}


def product(**fields: Any) -> dict[str, Any]:
    return {"kind": "product", "product": {"image_path": "uploads/ball.png"} | fields}


# What is uploaded as uploads/bad, the job that names it, the code, and what the message names.
BAD: dict[str, tuple[Callable[[], bytes], dict[str, Any], str, str]] = {
    "init not there": (bytes, INIT | {"init_image_path": "uploads/none.png"}, "IMAGE_NOT_FOUND", "init_image_path"),
    "init no picture": (
        lambda: b"<html>",
        INIT | {"init_image_path": "uploads/bad"},
        "IMAGE_INVALID",
        "init_image_path",
    ),
    "init of 100 Mpx": (
        lambda: png(Image.new("1", (10_000, 10_000))),
        INIT | {"init_image_path": "uploads/bad"},
        "INPUT_TOO_LARGE",
        "init_image_path",
    ),
    "strength without a step": (bytes, INIT | {"strength": 0.01}, "INVALID_INPUT", "strength"),
    "mask not there": (bytes, MASKED | {"mask_path": "uploads/none.png"}, "IMAGE_NOT_FOUND", "mask_path"),
    "mask of other proportions": (
        lambda: png(left_half((128, 64))),
        MASKED | {"mask_path": "uploads/bad"},
        "IMAGE_INVALID",
        "mask_path",
    ),
    "black mask": (
        lambda: png(Image.new("L", (128, 128))),
        MASKED | {"mask_path": "uploads/bad"},
        "IMAGE_INVALID",
        "mask_path",
    ),
    "control not there": (bytes, control(image_path="uploads/none.png"), "IMAGE_NOT_FOUND", "control.image_path"),
    "control unknown": (bytes, control(model="pose"), "UNSUPPORTED_BY_MODEL", "control.model"),
    "product not there": (bytes, product(image_path="uploads/none.png"), "IMAGE_NOT_FOUND", "product.image_path"),
    "cut-out without alpha": (
        lambda: png(ball()),
        product(cutout_path="uploads/bad"),
        "IMAGE_INVALID",
        "product.cutout_path",
    ),
    "headline no font has": (bytes, {"text_overlay": {"text": "ᚠᛇᚻ 𒀀"}}, "FONT_MISSING", "text_overlay"),
    "headline in no known font": (
        bytes,
        {"text_overlay": {"text": "a", "font": "No Such Font"}},
        "FONT_MISSING",
        "No Such Font",
    ),
    "headline that turns round": (bytes, {"text_overlay": {"text": "a\u202eb"}}, "INVALID_INPUT", "text_overlay"),
    "style unknown": (bytes, {"style": "nobody's"}, "INVALID_INPUT", "style"),
    "industry unknown": (bytes, {"industry": "nobody's"}, "INVALID_INPUT", "industry"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_job_of_each_kind_fails_once_with_a_code_and_the_field(
    world: World, worker: Worker, name: str
) -> None:
    make, fields, code, named = BAD[name]
    world.upload("uploads/bad", make())
    steps = worker.metric("darkroom_denoise_steps_total")

    generation_id = world.publish(**fields)
    end = world.wait_for_end(generation_id)

    assert (end.kind, end.body.get("error_code")) == ("failed", code), end.body
    assert named in end.body["error_message"]
    assert worker.metric("darkroom_denoise_steps_total") == steps
    assert world.keys(f"generations/gen-{generation_id}") == []
