"""Decoding beside the steps: images are waited for late, in order, and not at all where their request has ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from inference.device.decoded_image import DecodedImage, image_of
from inference.device.host_copy import HostCopy
from inference.errors import EngineFault, RequestCancelled
from inference.lane import Lane
from inference.request import GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import (
    EngineCall,
    WatchedEngine,
    WatchedModel,
    arriving_together,
    submit_together,
)
from tests.support.images.parity import MIN_PSNR_DB, psnr, solo
from tests.support.models.tiny_models import build_tiny_sd

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class UnfinishedEvent:
    """An event of a device that is never done before it is waited for."""

    model: "LateModel"
    number: int

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.model.happened.append(f"wait {self.number}")
        if self.model.is_device_lost:
            raise RuntimeError("CUDA error: device-side assert triggered")


class LateModel(WatchedModel):
    """A model whose images come late. `happened`: its forwards, decodings and the waiting for them, in order."""

    happened: ClassVar[list[str]] = []
    is_device_lost = False

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        self.happened.append("forward")
        return super().denoise(lanes)

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> DecodedImage:
        number = sum(one.startswith("decode") for one in self.happened)
        self.happened.append(f"decode {number}")
        image = super().decode(latents, in_tiles=in_tiles)
        return replace(image, flagged=HostCopy(image.flagged.host, UnfinishedEvent(self, number)))


def tiny_request(num_steps: int, *seeds: int) -> GenerationRequest:
    return request_of(width=64, height=64, num_inference_steps=num_steps, seeds=seeds)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd(tmp_path_factory.mktemp("tiny") / "tiny-sd")


@pytest.fixture(scope="module")
def running(tiny: Path) -> Iterator[WatchedEngine]:
    made = WatchedEngine(tiny, LateModel)
    yield made
    made.close()


@pytest.fixture
def engine(running: WatchedEngine) -> WatchedEngine:
    LateModel.happened.clear()
    return running


def assert_right(checkpoint: Path, call: EngineCall) -> None:
    for seed, image in zip(call.request.seeds, call.images, strict=True):
        assert psnr(image, solo(checkpoint, call.request, seed=seed)) >= MIN_PSNR_DB


def test_decoder_values_become_bytes_and_nan_becomes_no_image() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 0.1, 2.0]).view(3, 1, 2)

    pixels = image_of(values).wait()
    assert pixels is not None
    assert pixels.tolist() == [[[0, 128, 140], [0, 255, 255]]]
    for wrong in (torch.nan, torch.inf):
        assert image_of(values.index_fill(2, torch.tensor([1]), wrong)).wait() is None


def test_an_image_is_waited_for_behind_the_next_forward_of_those_that_go_on(engine: WatchedEngine, tiny: Path) -> None:
    short, long = submit_together(engine, [tiny_request(2, 1), tiny_request(5, 2)])

    assert_right(tiny, short)
    assert_right(tiny, long)
    decoded_at = LateModel.happened.index("decode 1")  # behind the usher's
    assert LateModel.happened[decoded_at : decoded_at + 3] == ["decode 1", "forward", "wait 1"]


def test_images_that_end_together_are_launched_one_ahead_of_the_wait(engine: WatchedEngine, tiny: Path) -> None:
    call = EngineCall(engine, tiny_request(1, 1, 2, 3))

    assert_right(tiny, call)
    assert LateModel.happened[-6:] == ["decode 0", "decode 1", "wait 0", "decode 2", "wait 1", "wait 2"]


def test_image_of_a_cancelled_request_is_not_waited_for(engine: WatchedEngine, tiny: Path) -> None:
    calls: list[EngineCall] = []
    with arriving_together(engine):
        calls.append(EngineCall(engine, tiny_request(3, 1)))
        # The request above is decoded at the end of the turn in which this one is told of its third step.
        calls.append(EngineCall(engine, tiny_request(6, 2), at={3: calls[0].cancel}))

    assert isinstance(calls[0].error, RequestCancelled)
    assert_right(tiny, calls[1])
    num_decoded = sum(one.startswith("decode") for one in LateModel.happened)
    assert (num_decoded, sum(one.startswith("wait") for one in LateModel.happened)) == (3, 2)


def test_a_device_that_is_lost_while_an_image_is_under_way_ends_every_request_and_the_engine(tiny: Path) -> None:
    engine = WatchedEngine(tiny, LateModel)
    model = engine.model
    assert isinstance(model, LateModel)

    def lose() -> None:
        engine.lose_the_device()
        model.is_device_lost = True

    with arriving_together(engine):
        calls = [EngineCall(engine, tiny_request(3, 1)), EngineCall(engine, tiny_request(9, 2), at={3: lose})]

    assert all(isinstance(call.error, EngineFault) for call in calls)
    assert "device-side assert" in str(calls[0].error)
    assert engine.is_broken
    engine.close()
