"""What is drawn before the first job."""

import os
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console

import worker.cli.generate
from inference.engine.local_engine import _choose_device, _choose_dtype
from inference.engine.warm_up import WarmUp, lane_counts
from inference.errors import EngineFault, EngineStartFailed
from inference.lane import Lane
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, WatchedModel
from tests.support.images.parity import draw
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_z_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny checkpoint with random weights."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"))


class HeldModel(WatchedModel):
    """Fails forwards of more than `most` lanes with `error`."""

    most = 1 << 30
    error: Callable[[], Exception] = torch.OutOfMemoryError

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        predictions = super().denoise(lanes)
        if len(lanes) > self.most:
            raise self.error()
        return predictions


@pytest.fixture
def engine(tiny: Path) -> Iterator[WatchedEngine]:
    made = WatchedEngine(tiny, HeldModel, MAX_CONCURRENT_GENERATIONS=4)
    yield made
    made.close()


def warm_up_of(engine: WatchedEngine) -> WarmUp:
    return WarmUp(engine.model, engine._enqueue, engine.default.loop.forget)


def forwards_of(engine: WatchedEngine) -> list[tuple[int, bool]]:
    """Return of each forward that was tried the lanes, and whether they have an adapter."""
    return [(len(batch), bool(batch[0].owner.row)) for batch in engine.model.batches]


@pytest.mark.parametrize(
    ("max_lanes", "rows_per_lane", "counts"),
    [(10, 2, [1, 2, 4, 10]), (10, 1, [2, 4, 8, 10]), (256, 1, [2, 4, 8, 20]), (3, 2, [1, 2, 3]), (1, 1, [1])],
)
def test_batches_of_the_warm_up_are_of_two_to_twenty_rows_and_never_of_more_lanes_than_may_run(
    max_lanes: int, rows_per_lane: int, counts: list[int]
) -> None:
    assert lane_counts(max_lanes, rows_per_lane) == counts


def test_every_batch_size_takes_one_step_without_adapters_and_one_with(engine: WatchedEngine) -> None:
    before = draw(engine, request_of(width=64, height=64))[0]
    engine.model.batches.clear()
    engine.turns.clear()

    warm_up_of(engine).load_kernels(max_lanes=4)

    assert forwards_of(engine) == [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)]
    # Nothing stays but the memory that the adapter took
    assert draw(engine, request_of(width=64, height=64))[0] == before
    assert engine.turns[-1].slots_active == engine.turns[-1].slots_idle == 0


def test_warm_up_batch_that_does_not_fit_does_not_stop_the_start(
    engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "most", 2)

    warm_up_of(engine).load_kernels(max_lanes=4)

    # What was too large is known before the first job
    assert forwards_of(engine)[4:] == [(4, False), (2, False), (2, True)]


def test_warm_up_forward_that_fails_otherwise_stops_the_start(
    engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model, "most", 0)
    monkeypatch.setattr(engine.model, "error", ZeroDivisionError)

    with pytest.raises(EngineFault, match="ZeroDivisionError"):
        warm_up_of(engine).load_kernels(max_lanes=1)


def test_a_cpu_draws_one_image_and_no_batches_before_it_is_ready(tiny: Path) -> None:
    made = WatchedEngine(tiny)
    made.close()

    assert sum(turn.num_batched for turn in made.turns) == 3


def lengths_of(batch: Sequence[Lane]) -> set[int]:
    """Return the lengths of the batch's prompts, in tokens."""
    found = [lane.owner.conditioning for lane in batch]
    return {len(one.positive.tokens) for one in found if one is not None}


@pytest.mark.parametrize("max_lanes", [4, 1])
def test_every_kind_of_batch_takes_a_step_before_the_blocks_are_sealed(engine: WatchedEngine, max_lanes: int) -> None:
    engine.model.batches.clear()

    warm_up_of(engine).compile_blocks(max_lanes)

    batches = engine.model.batches
    assert {sum(lane.num_rows for lane in batch) for batch in batches} >= {1, 2}
    assert {lane.owner.request.height for batch in batches for lane in batch} == {64, 128}
    together = [lengths_of(batch) for batch in batches]
    assert {77} in together
    assert {bool(batch[0].owner.row) for batch in batches} == {False, True}
    if max_lanes > 1:
        # Behind a mask
        assert any(len(lengths) == 2 for lengths in together)
    else:
        assert forwards_of(engine) == [(1, False), (1, True)] * 7


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedEngine]:
    made = WatchedEngine(build_tiny_z_image(tmp_path_factory.mktemp("z_image")), MAX_CONCURRENT_GENERATIONS=2)
    yield made
    made.close()


def test_the_measured_step_is_guided_as_the_family_s_jobs_are(engine: WatchedEngine, z_image: WatchedEngine) -> None:
    for one in (engine, z_image):
        one.model.batches.clear()
        warm_up_of(one).measure_step()

    assert {lane.num_rows for batch in engine.model.batches for lane in batch} == {2}
    assert {lane.num_rows for batch in z_image.model.batches for lane in batch} == {1}


def test_the_adapter_of_zeros_fits_a_model_that_is_no_unet(z_image: WatchedEngine) -> None:
    z_image.model.batches.clear()

    warm_up_of(z_image).load_kernels(max_lanes=2)

    assert forwards_of(z_image) == [(2, False), (2, True)]


# --- The device and its dtype


class Properties(NamedTuple):
    major: int


class Gpu:
    """What torch queries of a GPU of compute capability `major`. It has tensors of every dtype, some by emulation."""

    def __init__(self, major: int) -> None:
        self._properties = Properties(major)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_properties", lambda _device: self._properties)
        patch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _device: True)


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_gpu_that_emulates_bfloat16_draws_in_float16(
    monkeypatch: pytest.MonkeyPatch, major: int, dtype: torch.dtype
) -> None:
    Gpu(major).install(monkeypatch)

    assert _choose_dtype("auto", torch.device("cuda")) is dtype


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:3"])
def test_named_gpu_is_the_only_one_in_its_process(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    Gpu(9).install(monkeypatch)

    assert _choose_device(name) == torch.device("cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_gpu_that_torch_does_not_find_is_refused_by_its_configured_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(EngineStartFailed, match=f"DEVICE is '{name}' but torch sees no GPU"):
        _choose_device(name)


def test_an_engine_without_a_process_of_its_own_is_given_its_gpu_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"DEVICE": "cuda:1", "CUDA_VISIBLE_DEVICES": "2,5", "CUDA_DEVICE_ORDER": ""}.items():
        monkeypatch.setenv(name, value)
    console = Console(file=StringIO())

    assert not worker.cli.generate.draw({"prompt": "a fox"}, tmp_path / "fox.png", model=str(tiny), console=console)

    assert console.file.getvalue().startswith("Not drawn: DEVICE is 'cuda:1'")  # type: ignore[attr-defined]
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("5", "PCI_BUS_ID")
