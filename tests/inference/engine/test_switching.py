"""Several models on one engine: which of them is on the device, and what its jobs get."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.model import DEFAULT_MODEL
from inference.checkpoints.memory_plan import RESERVE_BYTES
from inference.checkpoints.offload import HostedWeights
from inference.engine.local_engine import LocalEngine
from inference.engine.switching.decision import MAX_WAIT_SECONDS, MIN_STAY, Standing, is_due
from inference.errors import EngineStartFailed, RequestCancelled, RequestFailed
from inference.request import AdapterFile, EngineLoad, GenerationRequest, StepReport
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import PATIENCE_SECONDS, wait_for
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, images_of, psnr, settings_of
from tests.support.long import long_but
from tests.support.models.plain_families import alone
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_z_image, load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

FULL_BATCH = 10
NO_REQUESTS = Standing(num_waiting=0, oldest_at=0.0, num_running=0, entered_at=0.0, has_begun=False)


class Models:
    """An engine with two tiny models: the checkpoint of each by its name, and an adapter for it."""

    def __init__(self, folder: Path, *, fit_together: bool = False, **settings: Any) -> None:
        self.checkpoints = {
            DEFAULT_MODEL: build_tiny_sd(folder / "sd"),
            "z": build_tiny_z_image(folder / "z"),
        }
        self.adapters = {
            name: AdapterFile(
                write_adapter(folder / f"{name}.safetensors", load_pipe(checkpoint), layout="diffusers_new"), None, 1.0
            )
            for name, checkpoint in self.checkpoints.items()
        }
        self.loads: list[EngineLoad] = []
        variables = {
            "MODELS": f"z={self.checkpoints['z']}",
            "MAX_CONCURRENT_GENERATIONS": FULL_BATCH,
            "ADAPTER_SLOTS": 4,
            "ADAPTER_MAX_RANK": 8,
            **settings,
        }
        # The weights of both, and nothing for the adapters of two.
        num_bytes = sum(file.stat().st_size for file in folder.glob("*/*/*.safetensors"))
        room = RESERVE_BYTES + num_bytes * (2 if fit_together else 1)
        self.engine = LocalEngine(
            settings_of(self.checkpoints[DEFAULT_MODEL], **variables), self.loads.append, find_room=lambda _: room
        )
        self.loads.clear()

    def request(self, model: str, number: int, **fields: Any) -> GenerationRequest:
        usual: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.0}
        return request_of(
            request_id=f"{model}-{number}", model=model, seeds=(number,), arrived_at=time.monotonic(), **usual | fields
        )

    def expected(self, request: GenerationRequest) -> Any:
        return alone(self.checkpoints[request.model], request)

    @property
    def switches(self) -> list[str]:
        return [load.switching_to for load in self.loads if load.switching_to]


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Models]:
    """Start an engine whose device holds one of two models."""
    made = Models(tmp_path)
    yield made
    made.engine.close()


def test_each_model_draws_what_it_draws_alone_with_adapters_of_its_own_after_every_switch(models: Models) -> None:
    for model in (DEFAULT_MODEL, "z", DEFAULT_MODEL, "z"):
        plain = models.request(model, 7)
        styled = replace(plain, adapters=(models.adapters[model],))
        drawn = [draw(models.engine, one)[0] for one in (plain, styled)]

        assert psnr(drawn[0], models.expected(plain)) >= MIN_PSNR_DB
        assert psnr(drawn[1], models.expected(styled)) >= MIN_PSNR_DB
        assert psnr(*drawn) < DIFFERENT_DB
    assert models.switches == ["z", DEFAULT_MODEL, "z"]


def test_an_adapter_of_another_model_is_refused_by_the_model_that_is_asked(models: Models) -> None:
    request = models.request("z", 1, adapters=(models.adapters[DEFAULT_MODEL],))

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine, request)

    assert failure.value.code == "LORA_INCOMPATIBLE"


def test_sixty_mixed_requests_end_once_each_with_a_quarter_of_the_switches_of_their_order(models: Models) -> None:
    """As many at a time as a worker holds: two more than there are lanes."""
    order = random.Random(5)
    requests = [models.request(order.choice((DEFAULT_MODEL, "z")), number) for number in range(60)]
    naive = sum(one.model != other.model for one, other in itertools.pairwise(requests))
    held = threading.Semaphore(FULL_BATCH + 2)
    ended: list[str] = []
    futures = []

    for request in requests:
        held.acquire()
        future = models.engine.generate(request, lambda _: None, lambda: False)
        future.add_done_callback(lambda _, name=request.request_id: (ended.append(name), held.release()))
        futures.append(future)
    drawn = [images_of(future.result(PATIENCE_SECONDS))[0] for future in futures]

    assert sorted(ended) == sorted(one.request_id for one in requests)
    assert len(models.switches) <= naive / 4
    for number in (0, 29, 59):
        assert psnr(drawn[number], models.expected(requests[number])) >= MIN_PSNR_DB


def test_models_that_fit_together_take_turns_without_a_switch(tmp_path: Path) -> None:
    models = Models(tmp_path, fit_together=True)
    requests = [models.request(name, number) for number, name in enumerate((DEFAULT_MODEL, "z", DEFAULT_MODEL, "z"))]
    order: list[str] = []
    futures = [
        models.engine.generate(one, lambda _, name=one.model: order.append(name), lambda: False) for one in requests
    ]

    for request, future in zip(requests, futures, strict=True):
        assert psnr(images_of(future.result(PATIENCE_SECONDS))[0], models.expected(request)) >= MIN_PSNR_DB
    models.engine.close()
    assert models.switches == []
    # Neither was done before the other had begun.
    assert order.index("z") < len(order) - 1 - order[::-1].index(DEFAULT_MODEL)
    assert order.index(DEFAULT_MODEL) < len(order) - 1 - order[::-1].index("z")


def test_a_request_for_a_model_off_the_device_can_be_cancelled_while_it_waits(models: Models) -> None:
    cancelled, begun, may_go_on = threading.Event(), threading.Event(), threading.Event()

    def hold(_: StepReport) -> None:
        begun.set()
        may_go_on.wait(PATIENCE_SECONDS)

    running = models.engine.generate(models.request(DEFAULT_MODEL, 1), hold, lambda: False)
    assert begun.wait(PATIENCE_SECONDS)
    waiting = models.engine.generate(models.request("z", 2), lambda _: None, cancelled.is_set)
    cancelled.set()
    may_go_on.set()

    assert isinstance(waiting.exception(PATIENCE_SECONDS), RequestCancelled)
    assert running.result(PATIENCE_SECONDS)
    assert models.switches == []


def test_what_has_left_the_device_takes_no_memory_of_it(models: Models) -> None:
    default, other = (models.engine._switcher._models[name] for name in (DEFAULT_MODEL, "z"))
    pipeline: Any = default.family._pipeline
    draw(models.engine, models.request(DEFAULT_MODEL, 1, adapters=(models.adapters[DEFAULT_MODEL],)))
    on_device = pipeline.unet.conv_in.weight.data_ptr()
    assert default.family.bank.num_bytes > 0

    draw(models.engine, models.request("z", 2))

    assert (default.is_on_device, other.is_on_device) == (False, True)
    assert pipeline.unet.conv_in.weight.data_ptr() != on_device
    assert default.family.bank.num_bytes == 0
    loads = {load.name: load for load in models.loads[-1].models}
    assert (loads[DEFAULT_MODEL].is_on_device, loads["z"].is_on_device) == (False, True)


@pytest.mark.parametrize("weights", long_but(["fp8", "nf4"], "fp8"))
def test_quantized_models_draw_the_same_after_they_came_back(tmp_path: Path, weights: str) -> None:
    models = Models(tmp_path, WEIGHTS=weights)
    requests = [models.request(name, 3, adapters=(models.adapters[name],)) for name in (DEFAULT_MODEL, "z")]

    first, again = ([draw(models.engine, one)[0] for one in requests] for _ in range(2))
    models.engine.close()

    assert [one.tobytes() for one in first] == [one.tobytes() for one in again]
    assert models.switches == ["z", DEFAULT_MODEL, "z"]


def test_a_model_that_finds_no_memory_fails_its_requests_and_no_other(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(_: HostedWeights) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(HostedWeights, "enter", enter)
        with pytest.raises(RequestFailed) as failure:
            draw(models.engine, models.request("z", 1))
    assert failure.value.code == "GPU_OOM"
    assert str(failure.value).startswith("the model z does not fit the GPU's memory")

    for model in (DEFAULT_MODEL, "z"):
        request = models.request(model, 2)
        assert psnr(draw(models.engine, request)[0], models.expected(request)) >= MIN_PSNR_DB


def test_requests_of_a_model_that_makes_way_go_on_to_their_end(models: Models) -> None:
    """All of its images, of which there are more than lanes; nothing that has not begun begins."""
    many = models.request(DEFAULT_MODEL, 1, num_inference_steps=6)
    many = replace(many, seeds=tuple(range(FULL_BATCH + 2)))
    steps: list[StepReport] = []
    running = models.engine.generate(many, steps.append, lambda: False)
    wait_for(lambda: bool(steps))
    others = [
        models.engine.generate(models.request(model, number), lambda _: None, lambda: False)
        for number, model in enumerate(("z",) * FULL_BATCH + (DEFAULT_MODEL,), start=2)
    ]

    assert len(running.result(PATIENCE_SECONDS).images) == FULL_BATCH + 2
    assert all(other.result(PATIENCE_SECONDS) for other in others)
    assert models.switches == ["z", DEFAULT_MODEL]


def test_a_model_that_cannot_be_loaded_ends_the_start_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match=r"^MODELS photo: MODEL_ID '/nowhere'"):
        LocalEngine(settings_of(build_tiny_sd(tmp_path / "sd"), MODELS="photo=/nowhere"))


standings = st.builds(
    Standing,
    num_waiting=st.integers(0, 10),
    oldest_at=st.floats(0, 1000),
    num_running=st.integers(0, 4),
    entered_at=st.floats(0, 1000),
    has_begun=st.just(True),
)


@given(standings, standings, st.floats(0, 30), st.floats(1000, 2000))
@settings(max_examples=200, deadline=None)
def test_a_model_with_a_waiting_request_comes_within_the_bound(
    coming: Standing, leaving: Standing, switch_seconds: float, now: float
) -> None:
    def due(at: float) -> bool:
        return is_due(coming, leaving, now=at, switch_seconds=switch_seconds, full_batch=FULL_BATCH)

    latest = max(coming.oldest_at + MAX_WAIT_SECONDS, leaving.entered_at + MIN_STAY * switch_seconds)
    assert due(latest + 0.001) == bool(coming.num_waiting)
    # What is due stays due: a model that makes way is not let in again halfway.
    assert not due(now) or due(now + 1)


def test_a_model_without_requests_makes_way_at_once_and_one_with_requests_for_a_full_batch() -> None:
    one, full = (
        NO_REQUESTS._replace(num_waiting=1, oldest_at=99.0),
        NO_REQUESTS._replace(num_waiting=FULL_BATCH, oldest_at=99.0),
    )
    busy = NO_REQUESTS._replace(num_running=2, entered_at=50.0, has_begun=True)

    def due(coming: Standing, leaving: Standing, switch_seconds: float = 1.0) -> bool:
        return is_due(coming, leaving, now=100.0, switch_seconds=switch_seconds, full_batch=FULL_BATCH)

    assert due(one, NO_REQUESTS)
    assert not due(one, busy)
    assert due(full, busy)
    assert not due(full, busy._replace(num_waiting=1))
    # It came just now, at a price, or has had nothing of its place yet.
    assert not due(full, busy, switch_seconds=20.0)
    assert not due(full, NO_REQUESTS._replace(num_waiting=2))
    assert not due(NO_REQUESTS, NO_REQUESTS)
