"""Pictures that begin from a picture, and those that keep a part of it, against diffusers' own pipelines for them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from inference.checkpoints.offload import ensure_on_device, offload_in_turns
from inference.errors import RequestFailed
from inference.models.base import Family
from inference.models.loader import load_family
from inference.request import USUAL_KINDS, AdapterFile, GenerationRequest, Reference, Source
from tests.support.cuda.on_gpu import on_gpu
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import EngineCall, WatchedEngine, WatchedModel, submit_together
from tests.support.images.parity import MIN_PSNR_DB, demo_adapter, draw, psnr, settings_of
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.ldm_layout import write_single_file
from tests.support.models.plain_families import FROM_IMAGE as PIPELINES_FROM_IMAGE
from tests.support.models.plain_families import alone
from tests.support.models.tiny_chroma import build_tiny_chroma
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_models import (
    build_tiny_sd,
    build_tiny_sd_inpaint,
    build_tiny_sdxl,
    build_tiny_sdxl_inpaint,
    build_tiny_z_image,
    load_pipe,
    write_adapter,
)
from tests.support.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
    "sd_inpaint": build_tiny_sd_inpaint,
    "sdxl_inpaint": build_tiny_sdxl_inpaint,
    "flux": build_tiny_flux,
    "chroma": build_tiny_chroma,
    "schnell": lambda folder: build_tiny_flux(folder, is_schnell=True),
}
NUM_STEPS = 4
# A scheduler of each kind: of several steps, of two forwards to a step, and those that draw noise.
FROM_IMAGE = [
    ("sd", "dpm++", 0.3),
    ("sd", "heun", 0.8),
    ("sd", "euler_a", 1.0),
    ("sdxl", "unipc", 0.8),
    ("z_image", "euler", 0.3),
    ("z_image", "lcm", 1.0),
    ("flux", "euler", 0.6),
    ("flux", "unipc", 0.8),
    ("flux", "dpm++", 0.6),
    ("flux", "heun", 0.8),
    ("flux", "lcm", 1.0),
    ("schnell", "euler", 0.8),
    *(("chroma", scheduler, 0.6) for scheduler in ("euler", "unipc", "dpm++", "heun", "lcm")),
]
REPAINTED = [
    ("sd", "unipc", 0.3),
    ("sd", "heun", 0.8),
    ("sd", "euler_a", 0.8),
    ("sd", "dpm++", 1.0),
    ("sdxl", "lcm", 0.8),
    ("sdxl", "euler", 1.0),
    ("z_image", "dpm++", 0.3),
    ("z_image", "heun", 0.8),
    ("sd_inpaint", "euler_a", 0.8),
    ("sd_inpaint", "dpm++", 1.0),
    ("sdxl_inpaint", "euler", 1.0),
    ("flux", "euler", 0.8),
    ("flux", "unipc", 0.8),
    ("flux", "dpm++", 0.6),
    ("flux", "heun", 0.8),
    ("flux", "lcm", 1.0),
    ("schnell", "lcm", 0.8),
    *(("chroma", scheduler, 0.8) for scheduler in ("euler", "unipc", "dpm++", "heun", "lcm")),
]


class Models(FamilyModels):
    """The checkpoints of this file."""

    builders = CHECKPOINTS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


@cache
def gradients(size: int = 64) -> bytes:
    """Draw an image with detail everywhere."""
    y, x = np.mgrid[0:size, 0:size] / size
    return (255 * np.stack([x, y, (1 + np.sin(12 * x * y)) / 2], axis=-1)).astype(np.uint8).tobytes()


@cache
def window(size: int = 64) -> bytes:
    """Draw a mask: white in the middle, and not to the pixel where latents begin."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : 3 * size // 4 + 3, size // 8 + 5 : 3 * size // 4] = 255
    return mask.tobytes()


def tiny_request(*adapters: AdapterFile, **fields: Any) -> GenerationRequest:
    defaults = {"width": 64, "height": 64, "num_inference_steps": NUM_STEPS, "adapters": adapters}
    return request_of(**defaults | fields)


def assert_equal(models: Models, name: str, request: GenerationRequest) -> None:
    """Assert that alone in the engine the request gives the image that diffusers' own pipeline draws."""
    assert psnr(draw(models.engine(name), request)[0], alone(models.checkpoint(name), request)) >= MIN_PSNR_DB


# --- Alone


@pytest.mark.parametrize(
    ("name", "scheduler", "strength"),
    on_gpu(
        long_but(
            FROM_IMAGE,
            *FROM_IMAGE[:3],
            ("z_image", "euler", 0.3),
            ("flux", "unipc", 0.8),
            ("flux", "lcm", 1.0),
        ),
        ("sd", "euler_a", 1.0),
        ("sdxl", "unipc", 0.8),
        ("z_image", "euler", 0.3),
    ),
)
def test_image_to_image_equals_plain_diffusers(models: Models, name: str, scheduler: str, strength: float) -> None:
    assert_equal(models, name, tiny_request(scheduler=scheduler, source=Source(gradients(), strength)))


@pytest.mark.parametrize(
    ("name", "scheduler", "strength"),
    on_gpu(
        long_but(
            REPAINTED,
            ("sd", "heun", 0.8),
            ("sd", "euler_a", 0.8),
            ("sdxl", "lcm", 0.8),
            ("z_image", "heun", 0.8),
            ("sd_inpaint", "dpm++", 1.0),
            ("flux", "euler", 0.8),
            ("flux", "heun", 0.8),
        ),
        ("sd", "unipc", 0.3),
        ("sdxl", "lcm", 0.8),
        ("z_image", "heun", 0.8),
        ("sd_inpaint", "dpm++", 1.0),
    ),
)
def test_inpainting_equals_plain_diffusers(models: Models, name: str, scheduler: str, strength: float) -> None:
    assert_equal(models, name, tiny_request(scheduler=scheduler, source=Source(gradients(), strength, window())))


@pytest.mark.parametrize("name", long_but(CHECKPOINTS, "sd", "sd_inpaint", "z_image", "flux"))
def test_strength_image_and_mask_show_in_what_the_tiny_models_draw(models: Models, name: str) -> None:
    """Else none of these tests would see a wrong one."""
    engine = models.engine(name)
    source = Source(gradients(), 0.8, window())
    request = tiny_request(source=source)
    others = [
        replace(source, strength=0.25),
        replace(source, rgb=source.rgb[::-1]),
        replace(source, mask=bytes(64 * 64 // 2) + b"\xff" * (64 * 64 // 2)),
    ]

    drawn = draw(engine, request)[0]

    ratios = [psnr(drawn, draw(engine, replace(request, source=other))[0]) for other in others]
    assert max(ratios) < MIN_PSNR_DB, ratios


@pytest.mark.parametrize("name", ["sd", "sd_inpaint"])
@pytest.mark.parametrize("byte", [b"\x00", b"\xff"], ids=["black", "white"])
def test_a_mask_of_one_colour_keeps_everything_or_nothing_as_in_plain_diffusers(
    models: Models, name: str, byte: bytes
) -> None:
    assert_equal(models, name, tiny_request(num_inference_steps=3, source=Source(gradients(), 0.8, byte * 64 * 64)))


def test_an_image_that_is_not_square_is_encoded_upright(models: Models) -> None:
    size = {"width": 96, "height": 64}
    rgb, mask = gradients(96)[: 96 * 64 * 3], window(96)[: 96 * 64]

    assert_equal(models, "sd", tiny_request(**size, source=Source(rgb, 0.8)))
    assert_equal(models, "z_image", tiny_request(**size, source=Source(rgb, 0.8, mask)))
    assert_equal(models, "flux", tiny_request(**size, true_cfg_scale=2.0, source=Source(rgb, 0.8, mask)))


@long
def test_the_demo_model_restyles_and_repaints_as_plain_diffusers_does() -> None:
    checkpoint = DEMO_MODEL / "checkpoint"
    engine = WatchedEngine(checkpoint)
    photo = draw(engine, request_of(prompt="a castle", num_inference_steps=4))[0]
    fields = {"prompt": "neon: a castle", "adapters": (demo_adapter("neon"),), "num_inference_steps": 3}
    restyle = request_of(**fields, source=Source(photo.tobytes(), 0.7))
    repaint = request_of(**fields, source=Source(photo.tobytes(), 1.0, window(128)))

    calls = submit_together(engine, [restyle, repaint])

    for call in calls:
        assert psnr(call.image, alone(checkpoint, call.request)) >= MIN_PSNR_DB
    kept = np.asarray(calls[1].image, float)[:24] - np.asarray(photo, float)[:24]
    painted = np.asarray(calls[1].image, float)[48:80, 48:80] - np.asarray(photo, float)[48:80, 48:80]
    assert np.abs(kept).mean() < np.abs(painted).mean() / 3
    engine.close()


# --- In 16 bits


@cache
def checkers() -> bytes:
    """Draw black and white, which 16 bits hold exactly."""
    return (255 * (np.indices((64, 64)).sum(0) // 8 % 2)).astype(np.uint8).repeat(3).tobytes()


def sdxl_from_image(checkpoint: Path, dtype: torch.dtype) -> Any:
    """Load SDXL's own pipeline for image to image."""
    return PIPELINES_FROM_IMAGE["StableDiffusionXLPipeline"].from_pipe(load_pipe(checkpoint).to(dtype), dtype=dtype)


def encoded_by_diffusers(checkpoint: Path, dtype: torch.dtype) -> torch.Tensor:
    """Encode the image as SDXL's own pipeline does, one draw of noise into its generator."""
    pipe = sdxl_from_image(checkpoint, dtype)
    pixels = pipe.image_processor.preprocess(Image.frombytes("RGB", (64, 64), checkers()))
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        return pipe.prepare_latents(pixels, None, 1, 1, dtype, "cpu", generator, add_noise=False)  # type: ignore[no-any-return]


def encoded_by_us(family: Family) -> torch.Tensor:
    request = tiny_request(source=Source(checkers(), 0.8))
    assert request.source is not None
    with torch.inference_mode():
        image = family._encoded(request, request.source, in_tiles=False).image
    assert image is not None
    noise = torch.randn(image.mean.shape, generator=torch.Generator().manual_seed(1))
    return image.sample(noise)


@pytest.mark.parametrize("dtype", long_but([torch.bfloat16, torch.float16], torch.bfloat16), ids=str)
def test_sdxl_encodes_an_image_in_32_bits_as_its_own_pipelines_do(models: Models, dtype: torch.dtype) -> None:
    checkpoint = models.checkpoint("sdxl")
    family = load_family(settings_of(checkpoint), device=torch.device("cpu"), dtype=dtype)
    vae = family._pipeline.vae
    before = [weight.dtype for weight in vae.parameters()]

    ours = encoded_by_us(family)

    theirs = encoded_by_diffusers(checkpoint, dtype)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.to(dtype)[None] * vae.config.scaling_factor, theirs, rtol=rounding, atol=1e-4)
    assert [weight.dtype for weight in vae.parameters()] == before


class WideNoise(TorchFunctionMode):
    """Draws noise in 32 bits whatever was asked for: not every torch draws the same of a seed in 16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        return func(*args, **kwargs | {"dtype": torch.float32}).to(kwargs["dtype"])


@long
def test_sdxl_image_to_image_in_bfloat16_is_near_its_own_pipeline(models: Models) -> None:
    request = tiny_request(scheduler="euler", source=Source(gradients(), 0.6), num_inference_steps=6)
    engine = WatchedEngine(models.checkpoint("sdxl"), DTYPE="bfloat16")
    drawn = draw(engine, request)[0]
    engine.close()

    with WideNoise():
        theirs = sdxl_from_image(models.checkpoint("sdxl"), torch.bfloat16)(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            image=Image.frombytes("RGB", (64, 64), gradients()),
            strength=0.6,
            num_inference_steps=6,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seeds[0]),
        )

    # 44.3 dB where the picture is encoded in 16 bits.
    assert psnr(drawn, theirs.images[0]) >= 46.5


def test_an_encoder_out_of_memory_leaves_the_vae_s_weights_as_they_were(models: Models) -> None:
    dtype = torch.bfloat16
    family = load_family(settings_of(models.checkpoint("sdxl")), device=torch.device("cpu"), dtype=dtype)
    vae = family._pipeline.vae
    weights = [weight.data_ptr() for weight in vae.parameters()]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for a picture in 32 bits")

    handle = vae.encoder.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        encoded_by_us(family)
    handle.remove()

    assert [weight.data_ptr() for weight in vae.parameters()] == weights
    assert {weight.dtype for weight in vae.parameters()} == {dtype}


def test_an_encoder_in_32_bits_gives_its_place_on_the_device_back_as_it_was(models: Models) -> None:
    first, second = (
        load_family(settings_of(models.checkpoint("sdxl")), device=torch.device("cpu"), dtype=torch.bfloat16)
        for _ in range(2)
    )
    in_host_memory = [weight.data_ptr() for weight in second._pipeline.vae.parameters()]
    offload_in_turns(second._pipeline, torch.device("cpu"))

    assert torch.equal(encoded_by_us(first), encoded_by_us(second))
    on_device = list(second._pipeline.vae.parameters())
    assert {weight.dtype for weight in on_device} == {torch.bfloat16}
    assert not {weight.data_ptr() for weight in on_device} & set(in_host_memory)
    ensure_on_device(second._pipeline.unet)
    assert [weight.data_ptr() for weight in second._pipeline.vae.parameters()] == in_host_memory


# --- Together


def eight(folder: Path, pipe: Any) -> list[GenerationRequest]:
    """Build requests of every kind, with and without adapters, of step counts and schedulers of their own."""
    few = AdapterFile(write_adapter(folder / "few.safetensors", pipe, layout="diffusers_new", rank=4, seed=1), None, 1)
    kohya = AdapterFile(write_adapter(folder / "kohya.safetensors", pipe, layout="kohya", rank=6, seed=2), None, 0.8)

    def request(
        seed: int, *adapters: AdapterFile, strength: float = 0.0, mask: bytes | None = None, **fields: Any
    ) -> Any:
        source = Source(gradients(), strength, mask) if strength else None
        return tiny_request(*adapters, seeds=(seed,), source=source, **fields)

    return [
        request(1, few, num_inference_steps=6, scheduler="euler_a"),
        request(2, num_inference_steps=8, guidance_scale=1.0),
        request(3, kohya, strength=0.6, num_inference_steps=6),
        request(4, few, strength=0.8, num_inference_steps=5, scheduler="euler_a", guidance_scale=1.0),
        request(5, strength=1.0, num_inference_steps=3, scheduler="heun"),
        request(6, few, kohya, strength=1.0, mask=window(), num_inference_steps=4),
        request(7, kohya, strength=0.5, mask=window(), num_inference_steps=6, scheduler="unipc"),
        request(8, strength=0.9, mask=window(), num_inference_steps=4, scheduler="lcm", guidance_scale=5.0),
    ]


def test_eight_requests_of_every_kind_share_forwards_and_each_gives_the_image_it_gives_alone(
    models: Models, tmp_path: Path
) -> None:
    engine = models.engine("sd")
    requests = eight(tmp_path, load_pipe(models.checkpoint("sd")))
    engine.model.batches.clear()

    calls = submit_together(engine, requests)

    ratios = [psnr(call.image, alone(models.checkpoint("sd"), call.request)) for call in calls]
    assert min(ratios) >= MIN_PSNR_DB, ratios
    together = [{lane.owner.request.kind for lane in lanes} for lanes in engine.model.batches]
    assert sum(kinds == set(USUAL_KINDS) for kinds in together) >= 2
    assert max(map(len, engine.model.batches)) >= 4


def test_requests_of_every_kind_share_forwards_of_flux_too(models: Models, tmp_path: Path) -> None:
    engine, checkpoint = models.engine("flux"), models.checkpoint("flux")
    weights = write_adapter(tmp_path / "few.safetensors", load_pipe(checkpoint), layout="diffusers_new", rank=4, seed=1)
    few = AdapterFile(weights, None, 1.0)
    source, masked = Source(gradients(), 0.7), Source(gradients(), 0.9, window())
    engine.model.batches.clear()

    calls = submit_together(
        engine,
        [
            tiny_request(few, seeds=(1,), num_inference_steps=5),
            tiny_request(few, seeds=(2,), source=source, true_cfg_scale=3.0),
            tiny_request(seeds=(3,), source=masked, true_cfg_scale=2.0, scheduler="lcm"),
            tiny_request(few, seeds=(4,), source=masked, scheduler="unipc"),
        ],
    )

    ratios = [psnr(call.image, alone(checkpoint, call.request)) for call in calls]
    assert min(ratios) >= MIN_PSNR_DB, ratios
    assert {lane.owner.request.kind for lane in max(engine.model.batches, key=len)} == set(USUAL_KINDS)


class EncodingModel(WatchedModel):
    """Notes before which of the forwards a picture was encoded, and whose."""

    encodings: list[tuple[int, str]]

    def _encoded(self, request: GenerationRequest, source: Source, *, in_tiles: bool) -> Any:
        self.encodings.append((len(self.batches), request.request_id))
        return super()._encoded(request, source, in_tiles=in_tiles)


def test_images_are_encoded_one_at_a_time_beside_denoising_and_once_for_all_lanes(models: Models) -> None:
    engine = WatchedEngine(models.checkpoint("sd"), EncodingModel)
    assert isinstance(engine.model, EncodingModel)
    engine.model.encodings = []
    requests = [
        tiny_request(request_id=name, seeds=(1, 2), num_inference_steps=4, source=Source(gradients(), 0.8))
        for name in ("one", "two", "three")
    ]

    calls = submit_together(engine, requests)

    for call in calls:
        second = replace(call.request, seeds=(2,))
        assert psnr(call.images[1], alone(models.checkpoint("sd"), second)) >= MIN_PSNR_DB
    turns = [turn for turn, _ in engine.model.encodings]
    assert [name for _, name in engine.model.encodings] == ["one", "two", "three"]
    assert len(set(turns)) == 3
    engine.close()


class FullModel(WatchedModel):
    """Without memory to encode a picture whole."""

    def _encoded(self, request: GenerationRequest, source: Source, *, in_tiles: bool) -> Any:
        if not in_tiles:
            raise torch.OutOfMemoryError("no room to encode the picture whole")
        encoded = super()._encoded(request, source, in_tiles=in_tiles)
        assert self._pipeline.vae.use_tiling
        return encoded


def test_an_image_too_large_to_encode_is_encoded_in_tiles(models: Models) -> None:
    engine = WatchedEngine(models.checkpoint("sd"), FullModel)

    # One tile is all of a picture as small as this.
    call = EngineCall(engine, tiny_request(source=Source(gradients(), 0.8)))

    assert psnr(call.image, alone(models.checkpoint("sd"), call.request)) >= MIN_PSNR_DB
    engine.close()


# --- What is told and what is refused


@pytest.mark.parametrize(
    # Of 3.12 steps the families' pipelines take three and four.
    ("name", "strength", "num_steps"),
    [("sd", 0.39, 3), ("z_image", 0.39, 4), ("flux", 0.39, 4)],
)
def test_reported_steps_are_those_taken(models: Models, name: str, strength: float, num_steps: int) -> None:
    source = Source(gradients(), strength)
    call = EngineCall(models.engine(name), tiny_request(num_inference_steps=8, scheduler="heun", source=source))

    assert call.future.result().num_inference_steps == 8
    assert [(step.step_index, step.num_steps) for step in call.steps] == [
        (index, num_steps) for index in range(num_steps + 1)
    ]


def test_a_strength_that_leaves_no_step_is_refused(models: Models) -> None:
    with pytest.raises(RequestFailed, match=r"strength 0\.1 of 4 steps") as failure:
        draw(models.engine("sd"), tiny_request(source=Source(gradients(), 0.1)))

    assert failure.value.code == "INVALID_INPUT"


@pytest.mark.parametrize("source", [Source(bytes(64), 0.8), Source(gradients(), 0.8, bytes(64))], ids=["rgb", "mask"])
def test_source_of_another_size_is_a_value_error(models: Models, source: Source) -> None:
    with pytest.raises(ValueError, match="64x64"):
        models.engine("sd").model.prepare(tiny_request(source=source))


@pytest.mark.parametrize(
    "fields",
    [{}, {"source": Source(gradients(), 0.8)}, {"references": (Reference(64, 64, gradients()),)}],
    ids=["text2image", "image2image", "edit"],
)
def test_inpainting_model_refuses_every_other_kind(models: Models, fields: dict[str, Any]) -> None:
    engine = models.engine("sdxl_inpaint")

    with pytest.raises(RequestFailed, match="inpaint and nothing else") as failure:
        draw(engine, tiny_request(**fields))

    assert failure.value.code == "UNSUPPORTED_BY_MODEL"
    assert engine.facts.kinds == ("inpaint",)
    assert models.engine("sd").facts.kinds == USUAL_KINDS


def test_inpainting_single_file_draws_what_its_folder_draws(models: Models, tmp_path: Path) -> None:
    folder = models.checkpoint("sd_inpaint")
    file = write_single_file(tmp_path / "model.safetensors", load_pipe(folder))
    request = tiny_request(source=Source(gradients(), 1.0, window()))

    engine = WatchedEngine(file, MODEL_CONFIG=str(folder))

    assert psnr(draw(engine, request)[0], draw(models.engine("sd_inpaint"), request)[0]) >= MIN_PSNR_DB
    engine.close()
