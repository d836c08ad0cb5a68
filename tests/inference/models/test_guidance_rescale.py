"""Rescaled guidance against plain diffusers' `guidance_rescale`, alone and in batches of several values."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.engine.local_engine import LocalEngine
from inference.errors import EngineStartFailed, RequestFailed
from inference.lane import ActiveRequest, Conditioning, Lane
from inference.models.inputs import Prompt
from inference.request import GenerationRequest, Source
from tests.support.cuda.on_gpu import on_gpu
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, submit_together
from tests.support.images.parity import MIN_PSNR_DB, draw, psnr, settings_of
from tests.support.models.family_models import FamilyModels
from tests.support.models.plain_families import alone
from tests.support.models.tiny_models import build_tiny_sd2, build_tiny_sdxl, build_tiny_z_image

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

RGB = bytes(torch.randint(256, (64 * 64 * 3,), generator=torch.Generator().manual_seed(1)).tolist())
MASK = (b"\xff" * 32 + b"\x00" * 32) * 64


class Models(FamilyModels):
    """The checkpoints of this file."""

    builders = {"sd": build_tiny_sd2, "sdxl": build_tiny_sdxl, "z_image": build_tiny_z_image}  # noqa: RUF012 - read only


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def guided(rescale: float, **fields: Any) -> GenerationRequest:
    usual = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 9.0, "guidance_rescale": rescale}
    return request_of(**usual | fields)


@pytest.mark.parametrize(
    ("name", "rescale"), on_gpu([("sd", 0.7), ("sd", 1.0), ("sdxl", 0.2), ("sdxl", 1.0)], ("sdxl", 0.2))
)
def test_rescaled_image_equals_plain_diffusers(models: Models, name: str, rescale: float) -> None:
    request = guided(rescale)

    drawn = draw(models.engine(name), request)[0]

    assert psnr(drawn, alone(models.checkpoint(name), request)) >= MIN_PSNR_DB
    assert psnr(drawn, draw(models.engine(name), replace(request, guidance_rescale=0.0))[0]) < MIN_PSNR_DB


@pytest.mark.parametrize("mask", [None, MASK], ids=["image2image", "inpaint"])
def test_rescaled_image_from_a_source_equals_plain_diffusers(models: Models, mask: bytes | None) -> None:
    request = guided(0.7, source=Source(RGB, 0.8, mask))

    drawn = draw(models.engine("sdxl"), request)[0]

    assert psnr(drawn, alone(models.checkpoint("sdxl"), request)) >= MIN_PSNR_DB


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lanes_of_several_values_in_one_batch_equal_plain_diffusers_of_each(models: Models, name: str) -> None:
    requests = [
        guided(0.7, seeds=(1,)),
        guided(0.0, seeds=(2,)),
        guided(0.7, seeds=(3,), guidance_scale=1.0),
        guided(0.2, seeds=(4,), guidance_scale=5.0),
        guided(1.0, seeds=(5,), negative_prompt=""),
    ]

    calls = submit_together(models.engine(name), requests)

    for call in calls:
        assert psnr(call.image, alone(models.checkpoint(name), call.request)) >= MIN_PSNR_DB, call.request
    assert any(len(batch) > len(requests) - 1 for batch in models.engine(name).model.batches)


def lane_of(engine: WatchedEngine, request: GenerationRequest) -> Lane:
    """Prepare a lane that has joined."""
    active = ActiveRequest(request, engine.model.batch_traits(request), lambda _: None, lambda: False, ())
    active.conditioning = Conditioning(*engine.model.encode([Prompt("a hill"), Prompt("dark")], [(), ()]))
    (lane,) = active.lanes
    lane.sampler = engine.model.begin(lane)[1]
    return lane


def test_lane_without_rescaling_is_the_same_to_the_bit_beside_one_with_it(models: Models) -> None:
    engine = models.engine("sdxl")

    with torch.inference_mode():
        beside = [[lane_of(engine, guided(0.0)), lane_of(engine, guided(rescale))] for rescale in (0.0, 0.7)]
        first, second = (engine.model.denoise(lanes) for lanes in beside)

    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_result_has_the_rescaling_of_a_guided_image_alone(models: Models) -> None:
    def rescale_of(request: GenerationRequest) -> float:
        return models.engine("sdxl").generate(request, lambda _: None, lambda: False).result().guidance_rescale

    assert rescale_of(guided(0.7)) == 0.7
    assert rescale_of(guided(0.7, guidance_scale=1.0)) == 0.0


def test_z_image_refuses_a_rescaling(models: Models) -> None:
    with pytest.raises(RequestFailed, match=r"guidance_rescale belongs to .*SDXL; this worker runs z-image") as failure:
        draw(models.engine("z_image"), guided(0.7))

    assert failure.value.code == "INVALID_INPUT"


def test_default_rescaling_that_z_image_would_refuse_is_refused_at_the_start(tmp_path: Path) -> None:
    checkpoint = build_tiny_z_image(tmp_path)

    with pytest.raises(EngineStartFailed, match="GUIDANCE_RESCALE is for Stable Diffusion and SDXL"):
        LocalEngine(settings_of(checkpoint, GUIDANCE_RESCALE=0.7))
