"""An SDXL that predicts velocity with zero terminal SNR: every scheduler and kind against plain diffusers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr

from inference.request import GenerationRequest, Source
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, pipe_with, psnr
from tests.support.models.family_models import FamilyModels
from tests.support.models.plain_families import DIFFUSION_CHOICES, drawn_by
from tests.support.models.tiny_models import SDXL_SCHEDULER, build_tiny_sdxl, load_pipe

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

NAME = "zero_snr"
# What diffusers' classes take the last level for, which would be 0.
LAST_ALPHA = 2.0**-24
RGB = bytes(torch.randint(256, (64 * 64 * 3,), generator=torch.Generator().manual_seed(1)).tolist())
MASK = (b"\xff" * 32 + b"\x00" * 32) * 64
# At full strength an image is noised to the last level of the training, at which nothing of it is left.
SOURCES = {
    "text2image": None,
    "image2image": Source(RGB, 0.5),
    "image2image, full": Source(RGB, 1.0),
    "inpaint": Source(RGB, 0.6, MASK),
    "inpaint, full": Source(RGB, 1.0, MASK),
}


def build_zero_snr(folder: Path) -> Path:
    pipe = load_pipe(build_tiny_sdxl(folder))
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    pipe.scheduler.save_pretrained(folder / "scheduler")
    return folder


class Models(FamilyModels):
    """The checkpoint of this file."""

    builders: dict[str, Callable[[Path], Path]] = {NAME: build_zero_snr}  # noqa: RUF012 - read only


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def request(scheduler: str, source: Source | None = None, **fields: Any) -> GenerationRequest:
    return request_of(
        **{"width": 64, "height": 64, "num_inference_steps": 4} | fields, scheduler=scheduler, source=source
    )


def rescaled_betas() -> list[float]:
    """Rescale the betas of SDXL as diffusers does, in the form of a config."""
    start, end = (SDXL_SCHEDULER[name] ** 0.5 for name in ("beta_start", "beta_end"))
    betas = rescale_zero_terminal_snr(torch.linspace(start, end, 1000, dtype=torch.float32) ** 2)
    before_last = torch.cumprod(1 - betas, dim=0)[-2]
    betas[-1] = 1 - LAST_ALPHA / before_last
    return betas.tolist()


def plain_pipe(models: Models, scheduler: str) -> Any:
    pipe = pipe_with(models.checkpoint(NAME))
    if scheduler == "heun":
        # Its class has no rescaling: as a user who knows would give it the betas.
        config = HeunDiscreteScheduler.from_config(pipe.scheduler.config, trained_betas=rescaled_betas()).config
        pipe.scheduler = HeunDiscreteScheduler.from_config(config)
    return pipe


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", DIFFUSION_CHOICES)
def test_an_image_of_every_scheduler_and_kind_equals_plain_diffusers(models: Models, name: str, kind: str) -> None:
    wanted = request(name, SOURCES[kind])

    drawn = draw(models.engine(NAME), wanted)[0]

    assert psnr(drawn, drawn_by(plain_pipe(models, name), wanted)) >= MIN_PSNR_DB


def test_heun_draws_other_images_than_its_class_without_the_rescaling(models: Models) -> None:
    wanted = request("heun")

    drawn = draw(models.engine(NAME), wanted)[0]

    assert psnr(drawn, drawn_by(pipe_with(models.checkpoint(NAME)), wanted)) < DIFFERENT_DB


def test_lanes_of_all_schedulers_together_give_what_each_gives_alone(models: Models) -> None:
    requests = [request(name, request_id=name) for name in DIFFUSION_CHOICES]

    calls = submit_together(models.engine(NAME), requests)

    for name, call in zip(DIFFUSION_CHOICES, calls, strict=True):
        assert psnr(call.image, drawn_by(plain_pipe(models, name), call.request)) >= MIN_PSNR_DB, name
