"""What the engine asks of its device. A GPU's counters are stood in for: there is none where these tests must run."""

from dataclasses import dataclass

import pytest
import torch

from inference.device import USABLE_SHARE, Device
from inference.request import RequestFailed

GB = 10**9
SHAPE = (512, 512)


@dataclass
class Counters:
    """torch.cuda's memory counters, in bytes."""

    free: int = 20 * GB
    allocated: int = 4 * GB
    reserved: int = 4 * GB
    peak: int = 4 * GB

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "mem_get_info", lambda _device: (self.free, 24 * GB))
        patch.setattr(torch.cuda, "memory_allocated", lambda _device: self.allocated)
        patch.setattr(torch.cuda, "memory_reserved", lambda _device: self.reserved)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _device: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    made = Counters()
    made.install(monkeypatch)
    return made


def run(device: Device, counters: Counters, *, num_rows: int, takes: int) -> None:
    with device.measured(SHAPE, num_rows):
        counters.peak = counters.allocated + takes


def test_what_did_not_fit_is_not_tried_again_until_more_memory_is_free(counters: Counters) -> None:
    device = Device(torch.device("cuda"))
    assert device.may_fit(4096)

    counters.free = 2 * GB
    device.note_too_large(4096)

    assert [device.may_fit(size) for size in (1024, 4096, 8192)] == [True, False, False]
    counters.free = 3 * GB
    assert device.may_fit(4096)


def test_a_cpu_forgets_what_did_not_fit() -> None:
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


def test_the_largest_batch_that_was_measured_tells_best_what_a_row_takes(counters: Counters) -> None:
    device = Device(torch.device("cuda"))

    run(device, counters, num_rows=1, takes=3 * GB)
    run(device, counters, num_rows=10, takes=10 * GB)
    run(device, counters, num_rows=1, takes=3 * GB)

    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 20)


def test_what_was_loaded_during_a_forward_is_no_part_of_what_a_row_takes(counters: Counters) -> None:
    device = Device(torch.device("cuda"))

    with device.measured(SHAPE, 2):
        counters.allocated += 5 * GB
        counters.peak = counters.allocated + 2 * GB
    counters.reserved = counters.allocated

    assert device.max_rows(SHAPE) == int(USABLE_SHARE * 20)


def test_the_host_waits_for_the_step_before_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[int] = []
    num_made = 0

    class Event:
        def __init__(self) -> None:
            nonlocal num_made
            num_made += 1
            self.number = num_made

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            waited_for.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    device = Device(torch.device("cuda"))

    for _ in range(4):
        device.keep_pace()

    assert waited_for == [1, 2, 3]


def test_an_attempt_tells_errors_and_keeps_nothing_of_what_raised_them() -> None:
    device = Device(torch.device("cpu"))

    def fail() -> None:
        raise ValueError("no")

    attempt = device.attempt(fail)

    assert attempt.made is None
    assert isinstance(attempt.error, ValueError)
    assert attempt.error.__traceback__ is None
    assert device.attempt(lambda: 5) == (5, None)


def test_an_error_of_the_request_s_own_is_no_reason_to_look_at_the_device() -> None:
    # A device that would answer nothing: were it asked, DeviceBroken would come of it.
    device = Device(torch.device("meta"))
    refusal = RequestFailed("LORA_INVALID", "damaged")

    def refuse() -> None:
        raise refusal

    assert device.attempt(refuse).error is refusal
