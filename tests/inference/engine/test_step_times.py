"""Steps on a device that ends its work later than it is launched: when they are reported, and their seconds."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from inference.engine.warm_up import WarmUp
from inference.lane import Lane
from inference.request import GenerationResult, StepReport
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import PATIENCE_SECONDS, WatchedEngine, WatchedModel
from tests.support.images.parity import images_of
from tests.support.models.tiny_models import build_tiny_sd

pytestmark = pytest.mark.usefixtures("one_thread")

STEP_SECONDS = 5.0
DECODE_SECONDS = 3.0


@dataclass
class DeviceQueue:
    """A device's queue, in seconds: what the host has launched, and what is done, which it is only when waited for."""

    launched: float = 0.0
    done: float = 0.0


class LateModel(WatchedModel):
    """Gives the device work with every forward and every image, and waits for an image's pixels."""

    work = DeviceQueue()

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        self.work.launched += STEP_SECONDS
        return super().denoise(lanes)

    def decode(self, latents: torch.Tensor, *, in_tiles: bool = False) -> NDArray[np.uint8] | None:
        self.work.launched += DECODE_SECONDS
        self.work.done = self.work.launched
        return super().decode(latents, in_tiles=in_tiles)


def event_class(work: DeviceQueue) -> type:
    """Return `torch.cuda.Event` of that device."""

    class Event:
        def __init__(self, *, enable_timing: bool = False) -> None:
            self._has_time = enable_timing

        def record(self) -> None:
            self._at = work.launched

        def query(self) -> bool:
            return work.done >= self._at

        def synchronize(self) -> None:
            work.done = max(work.done, self._at)

        def elapsed_time(self, end: "Event") -> float:
            assert self._has_time and end._has_time and self.query() and end.query()
            return 1000 * (end._at - self._at)

    return Event


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny checkpoint with random weights."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def late(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchedEngine]:
    """Start the engine of such a device. Its memory is not counted: there is room for everything."""
    engine = WatchedEngine(tiny, LateModel)
    LateModel.work = DeviceQueue()
    monkeypatch.setattr(torch.cuda, "Event", event_class(LateModel.work))
    device = engine.default.loop._device
    monkeypatch.setattr(device, "may_fit", lambda _size: True)
    monkeypatch.setattr(device, "_free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    counter = {"all": {"current": 0, "peak": 0}}
    statistics = {"allocated_bytes": counter, "reserved_bytes": counter}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _device: statistics)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _device: 0)
    device._is_cuda = True
    yield engine
    engine.close()


class ReportedCall:
    """A request's reports, and how much of its work the device had done when each came."""

    def __init__(self, engine: WatchedEngine, num_steps: int) -> None:
        self.reports: list[StepReport] = []
        self.done: list[float] = []
        request = request_of(width=64, height=64, num_inference_steps=num_steps)
        self.future: Future[GenerationResult] = engine.generate(request, self._on_step, lambda: False)

    def _on_step(self, report: StepReport) -> None:
        assert not self.future_is_done
        self.reports.append(report)
        self.done.append(LateModel.work.done)

    @property
    def future_is_done(self) -> bool:
        return hasattr(self, "future") and self.future.done()


def test_the_seconds_of_all_steps_are_those_of_the_whole_by_the_device_s_clock(late: WatchedEngine) -> None:
    call = ReportedCall(late, num_steps=4)

    assert len(images_of(call.future.result(PATIENCE_SECONDS))) == 1

    assert [report.step_index for report in call.reports] == [0, 1, 2, 3, 4]
    assert [report.seconds for report in call.reports] == [0.0] + 4 * [STEP_SECONDS]


def test_step_is_reported_when_the_device_ended_it_and_not_at_its_launch(late: WatchedEngine) -> None:
    call = ReportedCall(late, num_steps=4)
    call.future.result(PATIENCE_SECONDS)

    # The host is a step ahead: it does not wait for the newest one.
    assert call.done[:4] == [0.0, STEP_SECONDS, 2 * STEP_SECONDS, 3 * STEP_SECONDS]
    assert late.model.work.launched == 4 * STEP_SECONDS + DECODE_SECONDS


def test_the_warm_up_measures_a_step_by_the_device_s_clock(late: WatchedEngine) -> None:
    assert WarmUp(late.model, late._enqueue, late.default.loop.forget).measure_step() == STEP_SECONDS
