"""Previews inside the engine: what they show, when they come, and that they cost no request anything."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from inference.device.device import Device
from inference.device.host_copy import HostCopy
from inference.engine.local_engine import LocalEngine
from inference.engine.previews import Previews, _Projected
from inference.lane import ActiveRequest, BatchTraits, Lane
from inference.latents.preview_projection import Projection, find_projection
from inference.models.loader import load_family
from inference.request import Preview, Source, StepReport
from inference.sampling.samplers import predict_x0
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import EngineCall, WatchedEngine, WatchedModel
from tests.support.images.parity import draw, settings_of
from tests.support.long import long_but
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_krea2 import build_tiny_krea2
from tests.support.models.tiny_models import (
    BETAS,
    build_tiny_sd,
    build_tiny_sd_inpaint,
    build_tiny_sdxl,
    build_tiny_z_image,
    load_pipe,
)
from tests.support.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DIFFUSION = BETAS | {"clip_sample": False}


# --- What the denoiser takes the finished latents to be


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predicted_x0_of_a_diffusion_is_that_of_diffusers(prediction_type: str) -> None:
    scheduler = diffusers.DDIMScheduler(**DIFFUSION, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    noisy, prediction = latents(0), latents(1)

    for time_step in scheduler.timesteps:
        theirs = scheduler.step(prediction, time_step, noisy).pred_original_sample
        torch.testing.assert_close(predict_x0(noisy, float(time_step), prediction, scheduler), theirs)


def test_predicted_x0_is_right_for_a_scheduler_with_scaled_latents() -> None:
    checkpoint = diffusers.PNDMScheduler(**BETAS)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(checkpoint.config)
    scheduler.set_timesteps(20)
    noisy, prediction = 14 * latents(0), latents(1)

    for time_step in scheduler.timesteps[:-1]:
        scaled = scheduler.scale_model_input(noisy, time_step)
        theirs = scheduler.step(prediction, time_step, noisy).pred_original_sample
        ours = predict_x0(scaled, float(time_step), prediction, checkpoint)
        # Its timesteps lie between those of training: what is looked up is of the nearest.
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_predicted_x0_of_a_flow_is_the_image_that_the_noise_was_mixed_with() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    image, noise = latents(0), latents(1)

    for time_step in scheduler.timesteps:
        noisy = scheduler.scale_noise(image, time_step[None], noise)
        torch.testing.assert_close(predict_x0(noisy, float(time_step), noise - image, scheduler), image)


# --- The projection


def test_colours_of_latents_are_bytes_in_rows_of_pixels() -> None:
    projection = Projection(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 0.0, 9.0]))
    found = projection(torch.tensor([[[-1.0, 1.0, 0.0]], [[0.0, -2.0, 2.0]]]))

    assert found.tolist() == [[[0, 128, 255], [255, 0, 255], [128, 255, 255]]]


def with_means(folder: Path) -> Path:
    """Configure the VAE as SDXL's successors: latents are shifted and scaled channel by channel."""
    config = folder / "vae" / "config.json"
    changed = json.loads(config.read_text()) | {"latents_mean": [0.1, -0.3, 0.0, 0.5], "latents_std": [2.0, 1.0, 3, 4]}
    config.write_text(json.dumps(changed))
    return folder


@pytest.mark.parametrize(
    "build",
    [
        build_tiny_sd,
        lambda folder: with_means(build_tiny_sdxl(folder)),
        build_tiny_z_image,
        build_tiny_flux,
        build_tiny_krea2,
    ],
    ids=["sd", "sdxl", "z-image", "flux", "krea-2"],
)
def test_each_family_s_projection_reads_latents_in_the_sampler_s_scale(
    build: Callable[[Path], Path], tmp_path: Path
) -> None:
    family = load_family(settings_of(build(tmp_path / "model")), device=CPU, dtype=torch.float32)
    vae = family._vae
    shape = (1, family._latent_shape(request_of(width=64, height=64))[0], 8, 8)
    sampled = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        in_its_own_scale = find_projection(vae, lambda same: same, CPU)(family._unscaled(sampled)[0])
        found = family.find_projection()(sampled[0])

    assert found.shape == (8, 8, 3)
    assert int((found.int() - in_its_own_scale.int()).abs().max()) <= 1
    assert found.float().std() > 1


def test_the_first_preview_of_flux_is_its_image_after_one_step_of_one(tmp_path: Path) -> None:
    checkpoint = build_tiny_flux(tmp_path / "flux")
    engine = LocalEngine(settings_of(checkpoint, PREVIEW_EVERY=1))
    steps: list[StepReport] = []
    draw(engine, request_of(width=64, height=96, num_inference_steps=2), steps)
    projection = engine.default.family.find_projection()
    engine.close()

    pipe = load_pipe(checkpoint)
    generator = torch.Generator().manual_seed(42)
    fields = {"width": 64, "height": 96, "num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
    packed = pipe("a red fox", generator=generator, **fields).images

    (preview,) = (step.preview for step in steps if step.preview is not None)
    expected = projection(pipe._unpack_latents(packed, 96, 64, pipe.vae_scale_factor)[0])
    shown = np.frombuffer(preview.rgb, np.uint8).reshape(preview.height, preview.width, 3)
    assert np.abs(shown.astype(int) - expected.numpy().astype(int)).max() <= 1


# --- The engine


@pytest.fixture(scope="module")
def demo() -> Iterator[LocalEngine]:
    made = LocalEngine(settings_of(DEMO_MODEL / "checkpoint", PREVIEW_EVERY=2))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd(tmp_path_factory.mktemp("tiny") / "tiny-sd")


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[LocalEngine]:
    made = LocalEngine(settings_of(tiny, PREVIEW_EVERY=3))
    yield made
    made.close()


def tiny_request(**fields: Any) -> Any:
    return request_of(width=64, height=64, **fields)


def with_previews(steps: list[StepReport]) -> list[int]:
    return [report.step_index for report in steps if report.preview]


def likeness(preview: Preview, image: Image.Image) -> float:
    """Correlate the preview with the image reduced to its size."""
    small = np.asarray(image.resize((preview.width, preview.height), Image.Resampling.BOX)).ravel()
    return float(np.corrcoef(np.frombuffer(preview.rgb, np.uint8), small)[0, 1])


@pytest.mark.gpu
def test_previews_look_like_the_image_from_the_second_step_on(demo: LocalEngine) -> None:
    steps: list[StepReport] = []
    (image,) = draw(demo, request_of(seeds=(3,), num_inference_steps=6), steps)

    previews = [report.preview for report in steps if report.preview]
    assert [(one.width, one.height) for one in previews] == [(16, 16)] * 2
    # The best matrix there is for this VAE, found on the model's own pictures, comes to 0.91 with finished latents.
    assert min(likeness(one, image) for one in previews) > 0.75


@pytest.mark.parametrize("scheduler", long_but(["dpm++", "heun", "euler_a"], "heun"))
def test_previews_come_every_n_steps_but_not_with_the_last(engine: LocalEngine, scheduler: str) -> None:
    steps: list[StepReport] = []
    draw(engine, tiny_request(num_inference_steps=7, scheduler=scheduler), steps)

    assert with_previews(steps) == [3, 6]


def test_lane_with_a_source_has_a_preview_every_n_of_its_own_steps(engine: LocalEngine) -> None:
    steps: list[StepReport] = []
    source = Source(bytes(64 * 64 * 3), 0.4)
    draw(engine, tiny_request(num_inference_steps=20, source=source), steps)

    assert with_previews(steps) == [3, 6]


def test_a_checkpoint_that_reads_a_mask_has_previews_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = LocalEngine(settings_of(build_tiny_sd_inpaint(tmp_path / "inpaint"), PREVIEW_EVERY=3))
    steps: list[StepReport] = []
    source = Source(bytes(64 * 64 * 3), 1.0, bytes([255]) * 64 * 64)
    draw(engine, tiny_request(source=source), steps)
    engine.close()

    assert with_previews(steps) == [3, 6]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_preview_of_several_images_shows_the_first(engine: LocalEngine) -> None:
    alone: list[StepReport] = []
    together: list[StepReport] = []
    draw(engine, tiny_request(num_inference_steps=5, seeds=(1,)), alone)
    draw(engine, tiny_request(num_inference_steps=5, seeds=(1, 2)), together)

    assert with_previews(together) == [3]
    seen, wanted = (np.frombuffer(steps[3].preview.rgb, np.uint8).astype(int) for steps in (together, alone))  # type: ignore[union-attr]
    assert np.abs(seen - wanted).max() <= 1


def test_previews_change_no_image_and_are_made_on_request_alone(engine: LocalEngine, tiny: Path) -> None:
    plain = LocalEngine(settings_of(tiny))
    steps: list[StepReport] = []
    request = tiny_request(num_inference_steps=7)

    (wanted,) = draw(plain, request, steps)
    plain.close()

    assert with_previews(steps) == []
    assert draw(engine, request)[0].tobytes() == wanted.tobytes()


class ModelWithoutPreviews(WatchedModel):
    """A model of which no preview can be made."""

    def predict_x0(self, lane: Lane, prediction: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room for a preview")


def test_failed_preview_costs_the_request_nothing(tiny: Path) -> None:
    engine = WatchedEngine(tiny, ModelWithoutPreviews, PREVIEW_EVERY=1)

    call = EngineCall(engine, tiny_request(num_inference_steps=4))
    assert call.image.size == (64, 64)
    engine.close()

    assert with_previews(call.steps) == []


class HeldEvent:
    """An event of the device that comes when it is let."""

    has_come = False

    def query(self) -> bool:
        return self.has_come

    def synchronize(self) -> None:
        raise AssertionError("a preview is waited for by nobody")


def test_preview_not_copied_yet_is_not_waited_for_and_comes_with_a_later_step(tiny: Path) -> None:
    family = load_family(settings_of(tiny), device=CPU, dtype=torch.float32)
    active = ActiveRequest(
        tiny_request(), BatchTraits((64, 64), is_guided=True, num_steps=8), lambda _: None, lambda: False, ()
    )
    previews, arrival = Previews(family, Device(CPU), every=1), HeldEvent()
    copy = HostCopy(torch.full((2, 3, 3), 7, dtype=torch.uint8), arrival)
    previews._copies.append(_Projected(active, copy))

    previews.deliver()
    assert active.preview is None
    arrival.has_come = True
    previews.deliver()

    assert active.preview == Preview(3, 2, bytes([7]) * 18)
