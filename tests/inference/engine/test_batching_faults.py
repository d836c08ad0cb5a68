"""What goes wrong for one request of a batch is that request's affair: cancelled, too large, broken, or all of it."""

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import pytest
import torch

import inference.engine.batcher
from inference.device.decoded_image import DecodedImage
from inference.engine.out_of_memory import TRIES_ALONE, TRIES_BESIDE_OTHERS
from inference.errors import EngineClosed, EngineFault, RequestCancelled, RequestFailed
from inference.lane import Embedding, Lane
from inference.lora.adapter import Adapter
from inference.lora.bank import AdapterBank, PackedAdapter
from inference.lora.products.rows import RowAdapters
from inference.models.inputs import Prompt
from inference.request import AdapterFile, GenerationRequest
from inference.sampling.samplers import Sampler
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import (
    PATIENCE_SECONDS,
    EngineCall,
    WatchedEngine,
    WatchedModel,
    arriving_together,
    submit_together,
    wait_for,
)
from tests.support.images.parity import MIN_PSNR_DB, images_of, plain, psnr, solo
from tests.support.long import long
from tests.support.models.tiny_models import EVERY_LAYER, build_tiny_sd, load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny checkpoint with random weights."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def style(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    """Write an adapter of every layer."""
    weights = tmp_path_factory.mktemp("adapters") / "style.safetensors"
    write_adapter(weights, load_pipe(tiny), layout="diffusers_new", rank=12, targets=EVERY_LAYER, text_encoder=True)
    return AdapterFile(weights, None, 1.0)


def tiny_request(*adapters: AdapterFile, **fields: Any) -> GenerationRequest:
    """Build a request of few steps in the tiny checkpoint's native size."""
    return request_of(**{"width": 64, "height": 64, "num_inference_steps": 4, "adapters": adapters} | fields)


def requests_with_seeds(*seeds: int, **fields: Any) -> list[GenerationRequest]:
    return [tiny_request(seeds=(seed,), **fields) for seed in seeds]


def assert_right(checkpoint: Path, calls: Sequence[EngineCall]) -> None:
    """Assert that every image is the one that plain diffusers draws for its request alone."""
    for call in calls:
        assert psnr(call.image, solo(checkpoint, call.request)) >= MIN_PSNR_DB, call.request


# --- Cancelling


def test_a_cancelled_request_leaves_within_a_turn_and_the_others_are_drawn_right(
    tiny: Path, style: AdapterFile
) -> None:
    engine = WatchedEngine(tiny)
    cancelled_at: list[int] = []

    def cancel() -> None:
        cancelled_at.append(len(engine.turns))
        calls[1].cancel()

    with arriving_together(engine):
        calls = [
            EngineCall(engine, tiny_request(style, seeds=(1,))),
            EngineCall(engine, tiny_request(seeds=(2,)), at={2: cancel}),
            EngineCall(engine, tiny_request(seeds=(3,), num_inference_steps=6)),
        ]

    assert isinstance(calls[1].error, RequestCancelled)
    assert calls[1].steps[-1].step_index == 2
    assert_right(tiny, [calls[0], calls[2]])
    assert [turn.num_batched for turn in engine.turns[cancelled_at[0] :][:2]] == [3, 2]
    engine.close()


def test_cancelling_takes_all_lanes_of_a_request_and_frees_its_slot(tiny: Path, style: AdapterFile) -> None:
    engine = WatchedEngine(tiny)
    cancelled_at: list[int] = []

    def cancel() -> None:
        cancelled_at.append(len(engine.turns))
        calls[0].cancel()

    with arriving_together(engine):
        calls = [
            EngineCall(engine, tiny_request(style, seeds=(1, 2, 3, 4)), at={2: cancel}),
            EngineCall(engine, tiny_request(seeds=(5,), num_inference_steps=6)),
        ]

    assert isinstance(calls[0].error, RequestCancelled)
    assert_right(tiny, [calls[1]])
    at_once, next_turn = engine.turns[cancelled_at[0] :][:2]
    assert (at_once.num_lanes, at_once.slots_active) == (5, 1)
    assert (next_turn.num_lanes, next_turn.slots_active, next_turn.slots_idle) == (1, 0, 1)
    engine.close()


@pytest.mark.parametrize("way", ["by its future", "by its flag"])
def test_a_waiting_request_is_cancelled_before_it_begins(tiny: Path, way: str) -> None:
    engine = WatchedEngine(tiny, MAX_CONCURRENT_GENERATIONS=1)

    def cancel() -> None:
        if way == "by its future":
            second.future.cancel()
        else:
            second.cancel()

    with arriving_together(engine):
        first = EngineCall(engine, tiny_request(seeds=(1,)), at={2: cancel})
        second, third = (EngineCall(engine, request) for request in requests_with_seeds(2, 3))

    assert_right(tiny, [first, third])
    with pytest.raises(CancelledError if way == "by its future" else RequestCancelled):
        second.future.result(PATIENCE_SECONDS)
    assert second.steps == []
    engine.close()


def test_future_cancelled_while_its_request_joins_affects_no_other(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = WatchedEngine(tiny)
    # The last thing asked before the request begins, which nobody else could meet but by chance.
    slots = engine.default.loop._admission.slots
    has_room = slots.has_room

    def cancel_and_look(wanted: dict[Hashable, int]) -> bool:
        cancelled.future.cancel()
        return has_room(wanted)

    with arriving_together(engine):
        monkeypatch.setattr(slots, "has_room", cancel_and_look)
        cancelled = EngineCall(engine, tiny_request())
        other = EngineCall(engine, tiny_request(seeds=(2,), num_inference_steps=6))

    with pytest.raises(CancelledError):
        cancelled.future.result(PATIENCE_SECONDS)
    assert_right(tiny, [other])
    assert cancelled.steps == []
    engine.close()


# --- Out of memory


class LowMemoryModel(WatchedModel):
    """Memory for three lanes."""

    MAX_LANES = 3

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        drawn = super().denoise(lanes)
        if len(lanes) > self.MAX_LANES:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return drawn


def test_lanes_that_do_not_fit_are_halved_and_the_cap_holds_for_a_while(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.engine.batcher, "FORWARDS_UNTIL_RELAXED", 8)
    engine = WatchedEngine(tiny, LowMemoryModel, MAX_CONCURRENT_GENERATIONS=16)
    requests = requests_with_seeds(*range(10))
    roomy = WatchedEngine(tiny, MAX_CONCURRENT_GENERATIONS=16)

    calls = submit_together(engine, requests)

    assert_right(tiny, calls[::4])
    for call, other in zip(calls, submit_together(roomy, requests), strict=True):
        assert psnr(call.image, other.image) >= MIN_PSNR_DB
        assert [report.step_index for report in call.steps] == list(range(5))
    sizes = [len(batch) for batch in engine.model.batches]
    *alone, whole, half, quarter = sizes[:5]
    assert (alone, whole, half, quarter) == ([1, 1], 11, 5, 2), "the usher's last step is the first of all others"
    capped = sizes[4:]
    assert set(capped[:8]) == {2}
    assert capped[8] == 3
    engine.close()
    roomy.close()


class SmallModel(WatchedModel):
    """Memory for pictures of up to 96x64."""

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        request = lanes[0].owner.request
        if request.height * request.width > 96 * 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().denoise(lanes)


def test_an_image_that_does_not_fit_alone_fails_by_its_size_and_smaller_ones_beside_it_and_after_it_are_drawn(
    tiny: Path, style: AdapterFile
) -> None:
    engine = WatchedEngine(tiny, SmallModel)

    large = {"width": 128, "height": 96}
    requests = [tiny_request(seeds=(1,)), tiny_request(style, **large), tiny_request(seeds=(2,), **large)]
    calls = submit_together(engine, [*requests, tiny_request(style, seeds=(3,))])
    assert_right(tiny, [calls[0], calls[3]])
    after = EngineCall(engine, tiny_request(width=96))

    for call in calls[1:3]:
        assert isinstance(call.error, RequestFailed)
        assert call.error.code == "GPU_OOM"
        assert "128x96" in str(call.error)
        assert [report.step_index for report in call.steps] == [0]
    assert_right(tiny, [after])
    wait_for(lambda: engine.turns[-1].slots_active == 0)
    engine.close()


class LowMemoryDecoder(WatchedModel):
    """No memory to decode a picture of two as a whole; what it did is in `is_tiled`."""

    is_tiled: ClassVar[list[bool]] = []
    is_full = False

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> DecodedImage:
        if self.is_full and not in_tiles:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.is_tiled.append(in_tiles)
        return super().decode(latents, in_tiles=in_tiles)


def test_an_image_too_large_to_decode_is_decoded_in_tiles_and_the_next_one_whole(tiny: Path) -> None:
    engine = WatchedEngine(tiny, LowMemoryDecoder)
    model = engine.model
    assert isinstance(model, LowMemoryDecoder)
    request = tiny_request(width=128, height=128, num_inference_steps=2)
    tiled_pipe = load_pipe(tiny)
    tiled_pipe.vae.enable_tiling()

    model.is_full = True
    tiled = EngineCall(engine, request).image
    model.is_full = False
    whole = EngineCall(engine, request).image

    assert model.is_tiled[-2:] == [True, False]
    assert psnr(tiled, plain(tiled_pipe, request)) >= MIN_PSNR_DB
    assert psnr(whole, solo(tiny, request)) >= MIN_PSNR_DB
    assert psnr(tiled, whole) < MIN_PSNR_DB
    engine.close()


class FullBank(AdapterBank):
    """No memory for another adapter, as often as `num_failures` says."""

    num_failures = 0
    num_tries = 0

    def write(self, place: tuple[int, ...], packed: PackedAdapter) -> None:
        self.num_tries += 1
        if self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().write(place, packed)


class FullModel(WatchedModel):
    """A model with such a bank, from its first adapter on."""

    @cached_property
    def full_bank(self) -> FullBank:
        self.bank.__class__ = FullBank
        assert isinstance(self.bank, FullBank)
        return self.bank


def test_an_adapter_that_found_no_memory_once_is_drawn_right_at_the_next_try(tiny: Path, style: AdapterFile) -> None:
    engine = WatchedEngine(tiny, FullModel)
    assert isinstance(engine.model, FullModel)

    engine.model.full_bank.num_failures = 1
    call = EngineCall(engine, tiny_request(style, seeds=(1,)))

    assert_right(tiny, [call])
    assert engine.model.full_bank.num_tries == 2
    wait_for(lambda: (engine.turns[-1].slots_active, engine.turns[-1].slots_idle) == (0, 1))
    engine.close()


def test_an_adapter_that_finds_no_memory_alone_either_fails_by_its_name_and_the_others_are_drawn_right(
    tiny: Path, style: AdapterFile
) -> None:
    engine = WatchedEngine(tiny, FullModel, MAX_CONCURRENT_GENERATIONS=3)
    assert isinstance(engine.model, FullModel)
    bank = engine.model.full_bank
    bank.num_failures = 1_000_000

    with arriving_together(engine):
        before = EngineCall(engine, tiny_request(seeds=(1,)))
        failed = EngineCall(engine, tiny_request(style, seeds=(2,)))
        after = [EngineCall(engine, request) for request in requests_with_seeds(3, 4)]
    assert isinstance(failed.error, RequestFailed)

    assert failed.error.code == "GPU_OOM"
    assert str(failed.error) == (
        "the GPU's memory does not hold adapter 1 of 1 beside the model, even alone:"
        " lower ADAPTER_MEMORY_GB, end what else runs there or use a larger GPU"
    )
    assert failed.steps == []
    assert bank.num_tries <= TRIES_BESIDE_OTHERS + TRIES_ALONE
    assert_right(tiny, [before, *after])
    bank.num_failures = 0
    assert_right(tiny, [EngineCall(engine, tiny_request(style, seeds=(5,)))])
    engine.close()


class ShortModel(FullModel):
    """Finds no memory at `place` for the request in need of it, as often as `num_failures` says."""

    NEEDY = "a fox in need of memory"
    place = ""
    num_failures = 0

    def pack(self, adapter: Adapter) -> PackedAdapter:
        self._run_short("pack")
        return super().pack(adapter)

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        if any(prompt.text == self.NEEDY for prompt in prompts):
            self._run_short("encode")
        return super().encode(prompts, adapters)

    def begin(self, lane: Lane, *, in_tiles: bool = False) -> tuple[str, Sampler]:
        if lane.owner.request.prompt == self.NEEDY:
            self._run_short("begin")
        return super().begin(lane, in_tiles=in_tiles)  # type: ignore[safe-super]

    def _run_short(self, place: str) -> None:
        if place == self.place and self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("place", ["pack", pytest.param("encode", marks=long), "begin"])
def test_a_request_that_finds_no_memory_beside_others_waits_and_is_drawn_right(
    tiny: Path, style: AdapterFile, place: str
) -> None:
    engine = WatchedEngine(tiny, ShortModel)
    model = engine.model
    assert isinstance(model, ShortModel)

    # Twice: prompts are encoded together and then alone, a lane begins as it is and then in tiles.
    model.place, model.num_failures = place, 2
    needy = tiny_request(style, seeds=(7, 8), prompt=ShortModel.NEEDY)
    calls = submit_together(engine, [tiny_request(seeds=(1,)), needy, tiny_request(seeds=(2,))])

    assert_right(tiny, [calls[0], calls[2]])
    first, second = calls[1].images
    assert psnr(first, solo(tiny, replace(needy, seeds=(7,)))) >= MIN_PSNR_DB
    assert psnr(second, solo(tiny, replace(needy, seeds=(8,)))) >= MIN_PSNR_DB
    assert model.num_failures == 0
    engine.close()


# --- Errors that nobody foresaw


class FailingSeedModel(WatchedModel):
    """Breaks on every batch that holds a certain seed, from that lane's third step on."""

    SEED = 666

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        drawn = super().denoise(lanes)
        if any(lane.seed == self.SEED and lane.num_steps_done >= 2 for lane in lanes):
            raise ValueError("an odd number of horns")
        return drawn


def test_a_request_that_breaks_every_batch_it_is_in_is_the_only_one_to_fail(tiny: Path, style: AdapterFile) -> None:
    engine = WatchedEngine(tiny, FailingSeedModel)
    requests = [
        tiny_request(style, seeds=(1,)),
        tiny_request(style, seeds=(5, FailingSeedModel.SEED)),
        *requests_with_seeds(2, 3, scheduler="euler_a", num_inference_steps=5),
    ]

    calls = submit_together(engine, requests)

    assert isinstance(calls[1].error, EngineFault)
    assert "an odd number of horns" in str(calls[1].error)
    others = [calls[0], *calls[2:]]
    assert_right(tiny, others)
    for call in others:
        assert [report.step_index for report in call.steps] == list(range(call.request.num_inference_steps + 1))
    assert not engine.is_broken
    engine.close()


def test_a_device_that_answers_nothing_ends_every_request_and_the_engine(tiny: Path, style: AdapterFile) -> None:
    engine = WatchedEngine(tiny, FailingSeedModel, MAX_CONCURRENT_GENERATIONS=3)

    with arriving_together(engine):
        calls = [
            EngineCall(engine, tiny_request(style)),
            EngineCall(engine, tiny_request(seeds=(FailingSeedModel.SEED,)), at={2: engine.lose_the_device}),
            *(EngineCall(engine, request) for request in requests_with_seeds(3, 4, 5)),
        ]

    assert all(isinstance(call.error, EngineFault) for call in calls)
    assert engine.is_broken
    with pytest.raises(EngineClosed):
        EngineCall(engine, tiny_request())
    engine.close()


# --- Closing


def test_closing_finishes_what_is_being_drawn_and_drops_what_waits(tiny: Path) -> None:
    engine = WatchedEngine(tiny, MAX_CONCURRENT_GENERATIONS=1)
    is_begun = threading.Event()
    running = EngineCall(engine, tiny_request(), at={0: is_begun.set})
    waiting = EngineCall(engine, tiny_request(seeds=(2,)))
    assert is_begun.wait(PATIENCE_SECONDS)

    engine.close()

    assert images_of(running.future.result(timeout=0))[0].size == (64, 64)
    assert waiting.future.cancelled()


def test_a_request_that_comes_while_the_engine_closes_is_refused_rather_than_forgotten(
    tiny: Path, style: AdapterFile
) -> None:
    engine = WatchedEngine(tiny)

    class SlowPath(PosixPath):
        """A file on a disk so slow that the engine is closed before it answers."""

        def stat(self, **fields: Any) -> Any:
            engine.close()
            return super().stat(**fields)

    with pytest.raises(EngineClosed):
        EngineCall(engine, tiny_request(AdapterFile(SlowPath(style.weights), None, 1.0)))
