"""Product jobs on real parts: queue, store, rembg, engine, backend.

What breaks in the middle of one: `tests/live/test_faults_product.py`.
"""

import hashlib
import io
from typing import Any

import c2pa
import numpy as np
import pytest
from PIL import Image

from tests.support.images.products import bottle, protected_part
from tests.support.servers.certificates import Chain
from tests.support.world import Worker, World, eventually
from watermark.product.masks import product_mask
from watermark.product.placement import Layout, place_product

PROMPT = "a beach"
STEPS = 8


def png_of(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def on_white(product: Image.Image) -> Image.Image:
    """Draw a photograph of the product in poor light, without alpha."""
    photo = Image.new("RGB", (product.width + 200, product.height + 100), "white")
    photo.paste(product.convert("RGB").point(lambda value: value // 2), (100, 50), product)
    return photo


def stage(world: World, generation_id: int, name: str) -> Image.Image:
    return Image.open(io.BytesIO(stage_bytes(world, generation_id, name)))


def stage_bytes(world: World, generation_id: int, name: str) -> bytes:
    key = f"stages/gen-{generation_id}/{name}.png"
    return world.store.client().get_object(Bucket=world.bucket, Key=key)["Body"].read()  # type: ignore[no-any-return]


def kept_stages(world: World, generation_id: int) -> set[str]:
    folder = f"stages/gen-{generation_id}/"
    return {key.removeprefix(folder).removesuffix(".png") for key in world.keys(folder)}


def lane_steps(worker: Worker) -> float:
    return worker.metric("darkroom_denoise_lane_steps_total")


def assert_lane_steps(worker: Worker, steps: int, since: float = 0.0) -> None:
    """Assert the number of lane steps; the last one is counted a moment after its image is there."""
    eventually(lambda: lane_steps(worker) - since == steps, lambda: str(lane_steps(worker) - since))


def metadata_of(world: World, generation_id: int) -> dict[str, Any]:
    end = world.wait_for_end(generation_id)
    assert end.kind == "complete", end.body
    return end.body["metadata"]  # type: ignore[no-any-return]


def pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(image.convert("RGB")).astype(np.int16)


def test_product_job_draws_and_stores_all_its_stages(world: World, worker: Worker, chain: Chain) -> None:
    photo = world.upload("uploads/bottle.png", png_of(on_white(bottle())))

    job = world.publish(
        kind="product",
        prompt=PROMPT,
        num_inference_steps=STEPS,
        product={"image_path": photo, "refine_strength": 0.5},
        text_overlay={"text": "Sale"},
        artist_name="Darkroom",
    )

    metadata = metadata_of(world, job)
    names = ["cutout", "background", "composite", "refined", "headline", "final"]
    assert metadata["stages"] == {name: f"s3://{world.bucket}/stages/gen-{job}/{name}.png" for name in names}
    assert kept_stages(world, job) == set(names)
    assert stage_bytes(world, job, "final") == world.png(job)
    assert len({stage(world, job, name).tobytes() for name in names}) == len(names)
    assert (metadata["kind"], metadata["steps"], metadata["width"]) == ("product", STEPS, 128)
    assert stage(world, job, "cutout").mode == "RGBA"

    background, composite, cutout = (stage(world, job, name) for name in ("background", "composite", "cutout"))
    at = place_product(background, cutout.size, Layout(0.6, None))
    inside = protected_part(product_mask(composite.size, cutout, at))
    refined = pixels(stage(world, job, "refined"))
    assert inside.sum() > 100
    assert (refined[inside] == pixels(composite)[inside]).all()
    assert (refined != pixels(composite)).any()

    headline = pixels(stage(world, job, "headline"))
    assert (headline != refined).any()
    assert (headline == refined)[at.top : at.bottom, at.left : at.right].all()

    percentages = [call.body["progress"] for call in world.backend.calls("progress", job)]
    assert {one["total_steps"] for one in percentages} == {STEPS + STEPS // 2}
    shown = [one["progress_percent"] for one in percentages]
    assert shown == sorted(set(shown))
    ids = [str(job)]
    eventually(lambda: [str(one["generation_id"]) for one in worker.events("job out")][-1:] == ids, worker.log_tail)
    assert len(worker.events("job out")[-1]["stages"]) >= 8

    trust = c2pa.Context.from_dict({"trust": {"trust_anchors": chain.anchor}})
    manifest = c2pa.Reader("image/png", io.BytesIO(world.png(job)), context=trust)
    assert manifest.get_validation_state() == "Trusted"
    (action,) = manifest.get_active_manifest()["assertions"][0]["data"]["actions"]
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert PROMPT.encode() not in world.png(job)
    stored = world.store.client().head_object(Bucket=world.bucket, Key=f"generations/gen-{job}.png")
    assert stored["Metadata"]["sha256"] == hashlib.sha256(world.png(job)).hexdigest()


def test_background_changed_in_the_bucket_is_kept_and_nothing_is_drawn(world: World, worker: Worker) -> None:
    bottle_at = world.upload("uploads/cut.png", png_of(bottle()))
    first = world.publish(kind="product", prompt=PROMPT, num_inference_steps=4, product={"image_path": bottle_at})
    stages = metadata_of(world, first)["stages"]
    background = stage(world, first, "background")
    background.paste((250, 10, 10), (0, 0, 30, 30))
    world.upload(f"stages/gen-{first}/background.png", png_of(background))
    before = lane_steps(worker)

    second = world.publish(
        kind="product",
        prompt=PROMPT,
        product={"cutout_path": stages["cutout"], "background_image_path": stages["background"], "shadow": 0},
    )

    metadata = metadata_of(world, second)
    assert lane_steps(worker) == before
    assert (pixels(world.image(second))[:30, :30] == (250, 10, 10)).all()
    assert stage(world, first, "background").tobytes() == background.tobytes()
    assert metadata["stages"]["background"] == stages["background"]
    assert kept_stages(world, second) == {"composite", "final"}


def test_composite_changed_in_the_bucket_is_refined_around_the_product_s_new_place(
    world: World, worker: Worker
) -> None:
    cutout = world.upload("uploads/cut.png", png_of(bottle()))
    moved = Image.new("RGB", (128, 128), (200, 190, 160))
    product = bottle().convert("RGBa").resize((26, 77)).convert("RGBA")
    moved.paste(product, (7, 40), product)
    before = lane_steps(worker)

    job = world.publish(
        kind="product",
        prompt=PROMPT,
        num_inference_steps=STEPS,
        product={
            "cutout_path": cutout,
            "composite_path": world.upload("uploads/composite.png", png_of(moved)),
            "refine_strength": 0.5,
        },
    )

    assert set(metadata_of(world, job)["stages"]) == {"cutout", "composite", "refined", "final"}
    assert_lane_steps(worker, STEPS // 2, since=before)
    middle = (slice(80, 110), slice(12, 28))
    assert (pixels(world.image(job))[middle] == pixels(moved)[middle]).all()


@pytest.mark.parametrize(
    ("product", "code", "message"),
    [
        ({"image_path": "uploads/none.png"}, "IMAGE_NOT_FOUND", "product.image_path"),
        ({"image_path": "uploads/white.png"}, "IMAGE_INVALID", "product.image_path: no product was found"),
        ({"cutout_path": "uploads/white.png"}, "IMAGE_INVALID", "product.cutout_path has no transparent part"),
        (
            {"cutout_path": "uploads/cut.png", "composite_path": "uploads/white.png", "refine_strength": 0.3},
            "IMAGE_INVALID",
            "product.composite_path: the cut-out is not to be found",
        ),
    ],
)
def test_invalid_product_is_refused_before_anything_is_drawn(
    world: World, worker: Worker, product: dict[str, Any], code: str, message: str
) -> None:
    world.upload("uploads/white.png", png_of(Image.new("RGB", (128, 128), "white")))
    world.upload("uploads/cut.png", png_of(bottle()))
    before = lane_steps(worker)

    end = world.wait_for_end(world.publish(kind="product", prompt=PROMPT, product=product))

    assert (end.kind, end.body["error_code"]) == ("failed", code)
    assert message in end.body["error_message"]
    assert lane_steps(worker) == before
