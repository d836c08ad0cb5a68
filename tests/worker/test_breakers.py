"""Refused credentials: counted, waited out, and never a job's fault."""

import threading
from typing import Any

import pytest

from clients.storage.errors import AccessDenied, BucketNotFound, ObjectNotFound, StorageUnavailable
from config.backend import BackendSettings
from worker.breakers import (
    BACKEND_THRESHOLD,
    HALF_OPEN_SECONDS,
    STORE_THRESHOLD,
    Breaker,
    StoreGate,
    backend_breakers,
)
from worker.errors import JobReleased


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ImpatientEvent(threading.Event):
    """Draining that is waited for in no time; `waits` are the seconds that were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return self.is_set()


class Refusing:
    """Work that is denied `num_refusals` times, then done."""

    def __init__(self, num_refusals: int) -> None:
        self.num_refusals = num_refusals

    def __call__(self) -> str:
        if self.num_refusals:
            self.num_refusals -= 1
            raise AccessDenied("s3://media: the store answered InvalidAccessKeyId")
        return "done"


def test_three_refusals_in_a_row_open_the_backend_s_breaker_and_one_answer_closes_it() -> None:
    breaker = Breaker("the backend", BACKEND_THRESHOLD)

    reasons = []
    for _ in range(BACKEND_THRESHOLD):
        reasons.append(breaker.reason)
        breaker.refuse("HTTP 401")

    assert reasons == [""] * BACKEND_THRESHOLD
    assert breaker.reason == "the backend refuses this worker: HTTP 401"
    breaker.accept()
    assert breaker.reason == ""


def test_an_answer_between_two_refusals_begins_the_count_anew() -> None:
    breaker = Breaker("the backend", BACKEND_THRESHOLD)

    for _ in range(4):
        breaker.refuse("HTTP 401")
        breaker.refuse("HTTP 401")
        breaker.accept()

    assert breaker.reason == ""


def test_open_breaker_without_calls_lets_a_new_job_probe() -> None:
    clock = Clock()
    breaker = Breaker("the backend", STORE_THRESHOLD, clock)
    breaker.refuse("HTTP 403")

    clock.now += HALF_OPEN_SECONDS - 1
    assert breaker.reason
    clock.now += 2
    assert breaker.reason == ""
    breaker.refuse("HTTP 403")
    assert breaker.reason


@pytest.mark.parametrize(
    ("addresses", "num_breakers"),
    [
        ({}, 1),
        ({"WEBHOOK_COMPLETE_URL": "https://HOOKS.example/done", "WEBHOOK_FAILED_URL": "https://hooks.example:443/"}, 1),
        ({"WEBHOOK_COMPLETE_URL": "/done", "WEBHOOK_FAILED_URL": "https://hooks.example/"}, 2),
        ({"WEBHOOK_COMPLETE_URL": "/done", "WEBHOOK_FAILED_URL": "https://backend.example:8000/"}, 2),
        ({"WEBHOOK_COMPLETE_URL": "/done", "WEBHOOK_FAILED_URL": "http://backend.example:443/"}, 2),
    ],
    ids=["none of their own", "equal", "host", "port", "scheme"],
)
def test_addresses_of_the_backend_share_a_breaker_where_they_have_one_origin(
    addresses: dict[str, Any], num_breakers: int
) -> None:
    settings = BackendSettings(BACKEND_API_URL="https://backend.example", INTERNAL_API_TOKEN="token", **addresses)

    assert len(set(backend_breakers(settings).values())) == num_breakers


def test_denied_store_call_is_retried_until_done_with_the_breaker_open() -> None:
    breaker, is_draining = Breaker("the store", STORE_THRESHOLD), ImpatientEvent()
    reasons = []

    class Watched(Refusing):
        def __call__(self) -> str:
            reasons.append(bool(breaker.reason))
            return super().__call__()

    assert StoreGate(breaker, is_draining).retry_while_denied(Watched(7)) == "done"

    assert reasons == [False] + [True] * 7
    assert breaker.reason == ""
    assert is_draining.waits == [1.0, 2.0, 5.0, 10.0, 20.0, 20.0, 20.0]


def test_unreachable_store_is_retried_within_the_patience() -> None:
    calls = []

    def work() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise StorageUnavailable("s3://media: the store cannot be reached")
        return "done"

    breaker = Breaker("the store", STORE_THRESHOLD)

    assert StoreGate(breaker, ImpatientEvent()).retry_while_denied(work, patience_seconds=60) == "done"
    assert (len(calls), breaker.reason) == (4, "")


def test_unreachable_store_raises_at_once_without_patience() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        raise StorageUnavailable("s3://media: the store cannot be reached")

    with pytest.raises(StorageUnavailable):
        StoreGate(Breaker("the store", STORE_THRESHOLD), ImpatientEvent()).retry_while_denied(work)
    assert len(calls) == 1


def test_call_never_denied_closes_no_breaker() -> None:
    breaker = Breaker("the store", STORE_THRESHOLD)
    breaker.refuse("AccessDenied")

    StoreGate(breaker, ImpatientEvent()).retry_while_denied(Refusing(0))

    assert breaker.reason


def test_a_store_that_answers_that_an_object_is_missing_refuses_no_longer() -> None:
    breaker = Breaker("the store", STORE_THRESHOLD)
    answers: list[Exception] = [BucketNotFound("no such bucket"), ObjectNotFound("none")]

    def ask() -> None:
        raise answers.pop(0)

    with pytest.raises(ObjectNotFound):
        StoreGate(breaker, ImpatientEvent()).retry_while_denied(ask)

    assert breaker.reason == ""


def test_message_refused_again_counts_once_and_delays_no_probe() -> None:
    clock = Clock()
    breaker = Breaker("the backend", BACKEND_THRESHOLD, clock)
    for name in "aaabbbc":
        assert breaker.reason == ""
        breaker.refuse("HTTP 403", of=name)
    assert breaker.reason

    clock.now += HALF_OPEN_SECONDS - 1
    breaker.refuse("HTTP 403", of="a")
    clock.now += 2
    assert breaker.reason == ""


def test_stopping_worker_releases_the_job() -> None:
    is_draining = ImpatientEvent()
    is_draining.set()

    with pytest.raises(JobReleased):
        StoreGate(Breaker("the store", STORE_THRESHOLD), is_draining).retry_while_denied(Refusing(1))


def test_other_errors_are_raised() -> None:
    def work() -> None:
        raise ObjectNotFound("s3://media/a: the store answered 404")

    with pytest.raises(ObjectNotFound):
        StoreGate(Breaker("the store", STORE_THRESHOLD), ImpatientEvent()).retry_while_denied(work)
