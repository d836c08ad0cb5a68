"""The engine's queries of its device. A GPU's counters are replaced: there is none where these tests must run."""

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from config.visible_gpus import HIDDEN, visible_gpu
from inference.device.device import USABLE_SHARE, Device
from inference.errors import RequestFailed

GB = 10**9
SHAPE = (512, 512)


@dataclass
class Counters:
    """torch.cuda's memory counters, in bytes."""

    free: int = 20 * GB
    allocated: int = 4 * GB
    reserved: int = 4 * GB
    peak: int = 4 * GB

    num_read: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "mem_get_info", lambda _device: (self.free, 24 * GB))
        patch.setattr(torch.cuda, "memory_stats_as_nested_dict", self._read)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
        # These flatten all statistics for a single number
        for name in ("memory_stats", "memory_allocated", "max_memory_allocated", "memory_reserved"):
            patch.setattr(torch.cuda, name, self._refuse)

    def _read(self, _device: torch.device) -> dict[str, dict[str, dict[str, int]]]:
        self.num_read += 1
        return {
            "allocated_bytes": {"all": {"current": self.allocated, "peak": self.peak}},
            "reserved_bytes": {"all": {"current": self.reserved, "peak": self.reserved}},
        }

    def _refuse(self, _device: torch.device) -> int:
        raise AssertionError("all statistics are flattened for one number")


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    made = Counters()
    made.install(monkeypatch)
    return made


def run(device: Device, counters: Counters, *, num_rows: int, takes: int) -> None:
    with device.measured(SHAPE, num_rows):
        counters.peak = counters.allocated + takes


def test_shape_that_did_not_fit_is_not_retried_until_more_memory_is_free(counters: Counters) -> None:
    device = Device(torch.device("cuda"))
    assert device.may_fit(4096)

    counters.free = 2 * GB
    device.note_too_large(4096)

    assert [device.may_fit(size) for size in (1024, 4096, 8192)] == [True, False, False]
    counters.free = 3 * GB
    assert device.may_fit(4096)


def test_cpu_forgets_shapes_that_did_not_fit() -> None:
    device = Device(torch.device("cpu"))

    device.note_too_large(4096)

    assert device.may_fit(4096)


def test_a_cpu_has_room_for_any_batch() -> None:
    device = Device(torch.device("cpu"))

    with device.measured(SHAPE, 2):
        pass

    assert device.max_rows(SHAPE) > 10_000


def test_a_shape_that_was_never_measured_is_not_limited_and_others_measures_do_not_count(counters: Counters) -> None:
    device = Device(torch.device("cuda"))

    run(device, counters, num_rows=2, takes=10 * GB)

    assert device.max_rows((64, 64)) > 10_000


def test_the_rows_that_fit_are_those_that_the_free_memory_holds_by_what_a_row_took(counters: Counters) -> None:
    device = Device(torch.device("cuda"))
    run(device, counters, num_rows=2, takes=2 * GB)

    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 20)

    # What the allocator keeps for later is free too
    counters.reserved = 6 * GB
    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 22)
    # and where hardly anything is left, one row is tried all the same.
    counters.free, counters.reserved = 0, counters.allocated
    assert device.max_rows(SHAPE) == 1


def test_rows_leave_room_for_what_is_still_to_be_loaded(counters: Counters) -> None:
    device = Device(torch.device("cuda"), reserved_bytes=lambda: 5 * GB)

    run(device, counters, num_rows=2, takes=2 * GB)

    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 15)


def test_largest_measured_batch_gives_the_memory_of_a_row(counters: Counters) -> None:
    device = Device(torch.device("cuda"))

    run(device, counters, num_rows=1, takes=3 * GB)
    run(device, counters, num_rows=10, takes=10 * GB)
    run(device, counters, num_rows=1, takes=3 * GB)

    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 20)


def test_weights_loaded_during_a_forward_are_not_counted_to_its_rows(counters: Counters) -> None:
    device = Device(torch.device("cuda"))

    with device.measured(SHAPE, 2):
        counters.allocated += 5 * GB
        counters.peak = counters.allocated + 2 * GB
    counters.reserved = counters.allocated

    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 20)


def test_a_smaller_batch_than_one_that_was_measured_is_not_measured(counters: Counters) -> None:
    device = Device(torch.device("cuda"))
    run(device, counters, num_rows=10, takes=10 * GB)
    counters.num_read = 0

    run(device, counters, num_rows=9, takes=10 * GB)

    assert counters.num_read == 0


class Event:
    """torch.cuda.Event of a device that does its work when it is waited for; each event takes a second."""

    made: ClassVar[list["Event"]] = []
    num_done = 0

    def __init__(self, *, enable_timing: bool = False) -> None:
        self.has_time = enable_timing

    def record(self) -> None:
        self.made.append(self)
        self.number = len(self.made)

    def query(self) -> bool:
        return Event.num_done >= self.number

    def synchronize(self) -> None:
        Event.num_done = max(Event.num_done, self.number)

    def elapsed_time(self, end: "Event") -> float:
        assert self.has_time
        return 1000.0 * (end.number - self.number)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    monkeypatch.setattr(Event, "made", [])
    monkeypatch.setattr(Event, "num_done", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return Event


def test_the_host_waits_for_the_step_before_the_last_one(events: type[Event]) -> None:
    device = Device(torch.device("cuda"))
    done: list[int] = []

    for _ in range(4):
        device.keep_pace(device.mark())
        done.append(events.num_done)

    assert done == [0, 1, 2, 3]


def test_mark_is_past_once_the_device_reached_it_and_has_the_device_s_time(events: type[Event]) -> None:
    device = Device(torch.device("cuda"))
    first, _, third = device.mark(), device.mark(), device.mark()
    assert not first.is_past

    third.wait()

    assert first.is_past
    assert third.seconds_since(first) == 2.0


def test_mark_on_a_cpu_is_past_at_once_and_has_the_host_s_time() -> None:
    device = Device(torch.device("cpu"))
    began_at = time.monotonic()

    first, second = device.mark(), device.mark()

    device.keep_pace(second)
    assert first.is_past
    assert second.is_past
    assert 0 <= second.seconds_since(first) <= time.monotonic() - began_at


LISTS = ("", "-1", "0", "2,5", " 2 , 5", "0,-1,3", "-1,0", "1,1", "1gpu,2x", "x,1", "+3,4", ",1", "1,,2", "007,8")
UUID_LISTS = ("GPU-a,GPU-b", "GPU-a,1", "GPU-a,GPU-a", "MIG-x", "MIG-x,GPU-a", "1,GPU-a")


@pytest.mark.parametrize("listed", [*LISTS, *UUID_LISTS])
def test_the_list_of_gpus_is_read_as_torch_reads_it(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)

    expected = [str(one) for one in torch.cuda._parse_visible_devices()]

    found = [visible_gpu(f"cuda:{number}", listed) for number in range(len(expected))]
    assert found == expected
    if expected:
        with pytest.raises(ValueError, match="counts within"):
            visible_gpu(f"cuda:{len(expected)}", listed)
    else:
        assert visible_gpu("cuda", listed) == HIDDEN


def test_guard_returns_errors_without_references_to_their_frames() -> None:
    device = Device(torch.device("cpu"))

    def fail() -> None:
        raise ValueError("no")

    guarded = device.guard(fail)

    assert guarded.result is None
    assert isinstance(guarded.error, ValueError)
    assert guarded.error.__traceback__ is None
    assert device.guard(lambda: 5) == (5, None)


def test_error_of_the_request_itself_does_not_probe_the_device() -> None:
    # A device that would answer nothing: were it asked, DeviceBroken would come of it.
    device = Device(torch.device("meta"))
    refusal = RequestFailed("LORA_INVALID", "damaged")

    def refuse() -> None:
        raise refusal

    assert device.guard(refuse).error is refusal
