"""Jobs of the further families through a whole worker: real broker, store and backend, tiny checkpoints.

`make long` runs them: in the short form the engine's own tests draw every family, with the same defaults and adapters,
and the tests in `tests/live/drawing` hold the rest of a worker, which knows no families, against the demo model.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.request import AdapterFile, Reference
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, psnr
from tests.support.long import long, long_but
from tests.support.models.plain_families import alone
from tests.support.models.tiny_chroma import build_tiny_chroma
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_krea2 import build_tiny_krea2
from tests.support.models.tiny_models import build_tiny_sdxl, build_tiny_z_image, load_pipe, write_adapter
from tests.support.models.tiny_qwen_image import build_tiny_qwen_image
from tests.support.paths import SIGNATURE
from tests.support.world import World, new_world

pytestmark = long


class Expected(NamedTuple):
    """What a family makes of a job that leaves it the choice."""

    build: Callable[[Path], Path]
    steps: int
    guidance_scale: float
    # Of 70 pixels, the nearest that it can draw.
    rounded: int
    edits: bool = False


FAMILIES = {
    "tiny-sdxl": Expected(build_tiny_sdxl, steps=50, guidance_scale=7.5, rounded=72),
    "tiny-z-image": Expected(build_tiny_z_image, steps=8, guidance_scale=0.0, rounded=64),
    "tiny-chroma": Expected(build_tiny_chroma, steps=35, guidance_scale=5.0, rounded=64),
    "tiny-qwen-image": Expected(build_tiny_qwen_image, steps=50, guidance_scale=4.0, rounded=64),
    "tiny-krea-2": Expected(build_tiny_krea2, steps=28, guidance_scale=4.5, rounded=64),
    "tiny-flux": Expected(build_tiny_flux, steps=28, guidance_scale=3.5, rounded=64),
    "tiny-flux-2": Expected(build_tiny_flux_2, steps=50, guidance_scale=4.0, rounded=64, edits=True),
}


class TinyWorld(NamedTuple):
    """A world whose worker runs a tiny checkpoint, with an adapter for it and a signature in its bucket."""

    world: World
    checkpoint: Path
    adapter: Path
    expected: Expected


@pytest.fixture(scope="module", params=long_but(FAMILIES, "tiny-sdxl", "tiny-z-image"))
def place(
    request: pytest.FixtureRequest, rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TinyWorld]:
    folder, expected = tmp_path_factory.mktemp("family"), FAMILIES[request.param]
    checkpoint = expected.build(folder / request.param)
    pipe = load_pipe(checkpoint)
    adapter = write_adapter(
        folder / "style.safetensors", pipe, layout="diffusers_new", text_encoder=hasattr(pipe, "text_encoder_2")
    )
    with new_world(rabbitmq, s3_server, folder) as world:
        world.upload("models/style.safetensors", adapter.read_bytes())
        world.upload("signatures/a.png", SIGNATURE.read_bytes())
        world.start_worker(MODEL_ID=str(checkpoint), GUIDANCE_SCALE="").wait_until_ready()
        yield TinyWorld(world, checkpoint, adapter, expected)


def metadata_of(world: World, generation_id: int) -> dict[str, Any]:
    """Wait for the job to complete; return its metadata."""
    end = world.wait_for_end(generation_id)
    assert end.kind == "complete", end.body
    return dict(end.body["metadata"])


def test_a_job_with_an_adapter_gives_a_signed_image_in_the_nearest_size(place: TinyWorld) -> None:
    world, side = place.world, place.expected.rounded

    generation_id = world.publish(
        lora_path="models/style.safetensors",
        lora_scale=0.8,
        parameters={"width": 70, "height": 70, "steps": 4, "cfg_scale": 2.5, "scheduler": "unipc", "seed": 7},
        signature_path="signatures/a.png",
    )
    metadata = metadata_of(world, generation_id)

    assert {name: metadata[name] for name in ("model", "scheduler", "steps", "guidance_scale", "width", "height")} == {
        "model": place.checkpoint.name,
        "scheduler": "unipc",
        "steps": 4,
        "guidance_scale": 2.5,
        "width": side,
        "height": side,
    }
    unsigned = alone(
        place.checkpoint,
        request_of(
            negative_prompt="",
            width=side,
            height=side,
            num_inference_steps=4,
            guidance_scale=2.5,
            scheduler="unipc",
            seeds=(7,),
            adapters=(AdapterFile(place.adapter, None, 0.8),),
        ),
    )
    signed = world.image(generation_id)
    assert signed.size == (side, side)
    upper_left, lower_right = (0, 0, side // 2, side // 2), (side // 2, side // 2, side, side)
    assert psnr(signed.crop(upper_left), unsigned.crop(upper_left)) >= MIN_PSNR_DB
    assert psnr(signed.crop(lower_right), unsigned.crop(lower_right)) < DIFFERENT_DB
    world.wait_until_clean()


def test_steps_and_guidance_default_to_the_family_s(place: TinyWorld) -> None:
    world, expected = place.world, place.expected

    generation_id = world.publish(num_inference_steps=None, seed=3)
    metadata = metadata_of(world, generation_id)

    assert {name: metadata[name] for name in ("scheduler", "steps", "guidance_scale", "width", "height")} == {
        "scheduler": "euler",
        "steps": expected.steps,
        "guidance_scale": expected.guidance_scale,
        "width": 64,
        "height": 64,
    }
    request = request_of(
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=expected.steps,
        guidance_scale=expected.guidance_scale,
        seeds=(3,),
    )
    assert psnr(world.image(generation_id), alone(place.checkpoint, request)) >= MIN_PSNR_DB
    world.wait_until_clean()


def test_a_family_draws_an_edit_as_diffusers_does_or_refuses_it(place: TinyWorld) -> None:
    world = place.world
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((64, 64), (80, 100))]
    for number, image in enumerate(images):
        content = BytesIO()
        image.save(content, "PNG")
        world.upload(f"uploads/{number}.png", content.getvalue())

    references = [{"image_path": f"uploads/{number}.png"} for number in range(len(images))]
    generation_id = world.publish(kind="edit", references=references, seed=5, num_inference_steps=2, guidance_scale=4.0)
    end = world.wait_for_end(generation_id)

    if not place.expected.edits:
        assert (end.kind, end.body["error_code"]) == ("failed", "UNSUPPORTED_BY_MODEL")
        return
    assert (end.kind, end.body["metadata"]["kind"]) == ("complete", "edit")
    request = request_of(
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        seeds=(5,),
        references=tuple(Reference(*image.size, image.tobytes()) for image in images),
    )
    assert psnr(world.image(generation_id), alone(place.checkpoint, request)) >= MIN_PSNR_DB
    world.wait_until_clean()
