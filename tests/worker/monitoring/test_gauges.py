"""The polled gauges: what is shown of a queue that is there no more, or cannot be used."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.world import eventually
from worker.last_hour import LastHour
from worker.metrics import Metrics
from worker.monitoring.gauges import GaugePoller


class ScriptedDepths:
    """Stands in for the publisher: the depths of one poll after the other, the last one for ever."""

    def __init__(self, *polls: dict[str, int]) -> None:
        self._polls = list(polls)

    def depths(self) -> dict[str, int]:
        return self._polls.pop(0) if len(self._polls) > 1 else self._polls[0]


@pytest.fixture
def is_draining() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_queue_that_cannot_be_used_any_more_has_no_depth_rather_than_its_last(
    monkeypatch: pytest.MonkeyPatch, is_draining: threading.Event
) -> None:
    monkeypatch.setattr("worker.monitoring.gauges.GAUGE_SECONDS", 0.001)
    metrics = Metrics()
    publisher = ScriptedDepths({"jobs": 2, "express": 7}, {"jobs": 3})
    GaugePoller(
        metrics,
        cache=cast("Any", SimpleNamespace(size_bytes=0)),
        outbox=cast("Any", SimpleNamespace(backlog=lambda: SimpleNamespace(num_events=0, age_seconds=0.0))),
        publisher=cast("Any", publisher),
        gpu=cast("Any", SimpleNamespace(read=lambda: None)),
        last_hour=LastHour(),
        job_queues=("jobs", "express"),
        is_connected=lambda: True,
        is_draining=is_draining,
    ).start()

    def shown() -> dict[str, float]:
        [family] = metrics.queue_messages.collect()
        return {sample.labels["queue"]: sample.value for sample in family.samples}

    eventually(lambda: shown() == {"jobs": 3.0}, lambda: str(shown()))
