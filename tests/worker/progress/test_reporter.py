"""Progress is lossy but never out of order, never repeated, never after the end."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from clients.webhooks import Webhook, WebhookAttempt, WebhookKind, WebhookResult
from inference.request import StepReport
from tests.support.world import HANG_SECONDS
from worker.metrics import Metrics
from worker.progress.previews import Previewer
from worker.progress.reporter import JobProgress, ProgressReporter

MILESTONES = (0, 25, 50, 75, 90)
TAKEN = WebhookAttempt(WebhookResult.DELIVERED, 200, None, "HTTP 200", is_ambiguous=False)
REFUSED = WebhookAttempt(WebhookResult.REJECTED, 404, None, "HTTP 404", is_ambiguous=False)
# Nothing is stored by it, as no report has a preview.
NO_PREVIEWS = Previewer(storage=None, bucket="results")  # type: ignore[arg-type]


class SlowBackend:
    """A webhook client whose calls last while it is held."""

    def __init__(self) -> None:
        self.answer = TAKEN
        self.is_free = threading.Event()
        self.is_free.set()
        self.begun: queue.Queue[Webhook] = queue.Queue()
        self.ended: list[Webhook] = []

    def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
        assert 0 < deadline_seconds <= 5
        self.begun.put(webhook)
        assert self.is_free.wait(HANG_SECONDS)
        self.ended.append(webhook)
        return self.answer

    def next(self) -> dict[str, Any]:
        """Return the progress of the next call."""
        body: dict[str, Any] = self.begun.get(timeout=HANG_SECONDS).body["progress"]
        return body

    def next_percents(self, count: int) -> list[int]:
        return [self.next()["progress_percent"] for _ in range(count)]


@pytest.fixture
def backend() -> SlowBackend:
    return SlowBackend()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def reporter(backend: SlowBackend, metrics: Metrics) -> Iterator[ProgressReporter]:
    running = ProgressReporter(backend, NO_PREVIEWS, MILESTONES, metrics)  # type: ignore[arg-type]
    running.start()
    yield running
    backend.is_free.set()
    running.close()


def step(track: JobProgress, step_index: int, num_steps: int = 20, seconds: float = 2.0) -> None:
    took = seconds if step_index else 0.0
    track.on_step(StepReport(step_index=step_index, num_steps=num_steps, seconds=took))


def nothing_more(reporter: ProgressReporter, backend: SlowBackend) -> bool:
    """Return whether the sender has nothing left: reports of another job, sent behind, arrive next."""
    marker = reporter.follow("marker", 999)
    step(marker, 0)
    return backend.begun.get(timeout=HANG_SECONDS).webhook_id == "marker:progress:0"


def test_each_milestone_is_sent_once_and_in_order(reporter: ProgressReporter, backend: SlowBackend) -> None:
    track, webhooks = reporter.follow("task", 456), []

    for step_index in range(21):
        step(track, step_index)
        if 5 * step_index in MILESTONES:
            webhooks.append(backend.begun.get(timeout=HANG_SECONDS))

    assert [webhook.webhook_id for webhook in webhooks] == [f"task:progress:{percent}" for percent in MILESTONES]
    assert {webhook.kind for webhook in webhooks} == {WebhookKind.PROGRESS}
    assert webhooks[1].body == {
        "generation_id": 456,
        "progress": {"current_step": 5, "total_steps": 20, "progress_percent": 25, "estimated_seconds": 30},
    }
    assert nothing_more(reporter, backend)


def test_step_that_crosses_several_milestones_sends_them_all_in_order(
    reporter: ProgressReporter, backend: SlowBackend
) -> None:
    track = reporter.follow("task", 456)

    step(track, 0, num_steps=1)
    first = backend.next_percents(1)
    step(track, 1, num_steps=1)

    assert first + backend.next_percents(4) == list(MILESTONES)


def test_the_newest_report_wins_while_the_backend_is_slow(reporter: ProgressReporter, backend: SlowBackend) -> None:
    # Given a backend busy with the first report
    track = reporter.follow("task", 456)
    backend.is_free.clear()
    step(track, 0)
    assert backend.next_percents(1) == [0]

    # When three more milestones pass meanwhile
    for step_index in range(1, 16):
        step(track, step_index)
    backend.is_free.set()

    # Then only the newest of them is told, and what follows it
    assert backend.next_percents(1) == [75]
    step(track, 18)
    assert backend.next_percents(1) == [90]
    assert nothing_more(reporter, backend)


def test_a_slow_backend_does_not_hold_up_the_steps(reporter: ProgressReporter, backend: SlowBackend) -> None:
    backend.is_free.clear()
    track = reporter.follow("task", 456)

    for step_index in range(21):  # would not return if a step waited for the call
        step(track, step_index)

    assert backend.ended == []


def test_close_waits_for_the_call_in_flight_and_nothing_is_sent_after_it(
    reporter: ProgressReporter, backend: SlowBackend
) -> None:
    # Given a call that hangs, and a report behind it
    track = reporter.follow("task", 456)
    backend.is_free.clear()
    step(track, 0)
    assert backend.next_percents(1) == [0]
    step(track, 5)

    # When the track is closed, and a late step comes in
    closing = threading.Thread(target=track.close)
    closing.start()
    closing.join(0.05)
    was_waiting = closing.is_alive()
    step(track, 10)
    backend.is_free.set()
    closing.join(HANG_SECONDS)

    # Then closing took as long as the call, and nothing followed
    assert was_waiting
    assert not closing.is_alive()
    assert [webhook.webhook_id for webhook in backend.ended] == ["task:progress:0"]
    step(track, 20)
    assert nothing_more(reporter, backend)


def test_end_told_by_another_worker_while_a_call_lasted_is_looked_up_before_the_next(
    backend: SlowBackend, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may have been frozen in that call, and its job been done elsewhere."""
    monkeypatch.setattr("worker.progress.latest_wins.FREEZE_SECONDS", 0.0)  # every call is that long
    ends: dict[str, Any] = {}
    reporter = ProgressReporter(backend, NO_PREVIEWS, MILESTONES, metrics, end_of=ends.get)  # type: ignore[arg-type]
    reporter.start()
    try:
        track = reporter.follow("task", 456)
        backend.is_free.clear()
        step(track, 0)
        assert backend.next_percents(1) == [0]
        step(track, 5)
        ends["task"] = "an end"
        backend.is_free.set()

        assert nothing_more(reporter, backend)
    finally:
        reporter.close()


def test_closing_one_job_keeps_the_reports_of_others(reporter: ProgressReporter, backend: SlowBackend) -> None:
    first, second = reporter.follow("first", 1), reporter.follow("second", 2)
    step(first, 0)
    assert backend.next_percents(1) == [0]

    first.close()
    step(first, 5)
    step(second, 0)

    assert backend.begun.get(timeout=HANG_SECONDS).webhook_id == "second:progress:0"


def test_reports_of_several_jobs_alternate(reporter: ProgressReporter, backend: SlowBackend) -> None:
    first, second = reporter.follow("first", 1), reporter.follow("second", 2)
    backend.is_free.clear()
    step(first, 0)
    backend.next()

    step(first, 20)  # crosses four milestones at once
    step(second, 0)
    backend.is_free.set()

    webhooks = [backend.begun.get(timeout=HANG_SECONDS).webhook_id for _ in range(5)]
    assert webhooks.index("second:progress:0") == 1


def test_the_estimate_counts_down_by_what_steps_took(reporter: ProgressReporter, backend: SlowBackend) -> None:
    reporter.update_estimate(2.0)
    track, estimates = reporter.follow("task", 456), []

    for step_index in range(21):
        step(track, step_index, seconds=2.0)
        if 5 * step_index in MILESTONES:
            estimates.append(backend.next()["estimated_seconds"])

    assert estimates == [40, 30, 20, 10, 4]


def test_the_estimate_follows_the_job_s_own_steps_once_there_are_some(
    reporter: ProgressReporter, backend: SlowBackend
) -> None:
    reporter.update_estimate(100.0)
    track = reporter.follow("task", 456)

    step(track, 0)
    assert backend.next()["estimated_seconds"] == 2000
    for step_index in range(1, 6):
        step(track, step_index, seconds=1.0)

    assert backend.next()["estimated_seconds"] == 15


def test_first_estimate_follows_the_last_finished_job(reporter: ProgressReporter, backend: SlowBackend) -> None:
    # Given a worker whose warm-up took 1 s a step, and a job whose steps took 2 s
    reporter.update_estimate(1.0)
    track = reporter.follow("task", 456)
    for step_index in range(21):
        step(track, step_index, seconds=2.0)
    track.close()

    # When the next job begins
    step(reporter.follow("next", 457), 0)

    # Then its first estimate lies between the two
    while (webhook := backend.begun.get(timeout=HANG_SECONDS)).webhook_id != "next:progress:0":
        pass
    assert 20 < webhook.body["progress"]["estimated_seconds"] < 40


def test_a_job_begun_again_after_a_crash_repeats_no_milestone(reporter: ProgressReporter, backend: SlowBackend) -> None:
    # Given a job that got to 50 % before its engine crashed
    track = reporter.follow("task", 456)
    webhooks = []
    for step_index in range(11):
        step(track, step_index)
        if 5 * step_index in MILESTONES:
            webhooks += backend.next_percents(1)

    # When it begins again from the first step and gets there once more
    for step_index in range(11):
        step(track, step_index)

    # Then nothing is told until it gets further
    assert nothing_more(reporter, backend)
    for step_index in range(11, 21):
        step(track, step_index)
        if 5 * step_index in MILESTONES:
            webhooks += backend.next_percents(1)
    assert webhooks == list(MILESTONES)


def test_a_job_begun_again_after_a_crash_is_estimated_by_its_second_run_alone(
    reporter: ProgressReporter, backend: SlowBackend
) -> None:
    # Given a job that got to 70 % before its engine crashed
    track = reporter.follow("task", 456)
    for step_index in range(15):
        step(track, step_index, seconds=2.0)

    # When it begins again and gets to 75 %
    for step_index in range(16):
        step(track, step_index, seconds=2.0)

    # Then the five steps that are left take five steps' time
    while (progress := backend.next())["progress_percent"] != 75:
        pass
    assert progress["estimated_seconds"] == 10


def test_a_refused_report_is_counted_and_not_repeated(
    reporter: ProgressReporter, backend: SlowBackend, metrics: Metrics
) -> None:
    backend.answer = REFUSED
    track = reporter.follow("task", 456)

    step(track, 0)
    assert backend.next_percents(1) == [0]
    step(track, 5)
    assert backend.next_percents(1) == [25]
    track.close()

    labels = {"kind": "progress", "result": "rejected"}
    assert metrics.registry.get_sample_value("darkroom_webhooks_total", labels) == 2.0


def test_reporter_without_milestones_sends_nothing(backend: SlowBackend, metrics: Metrics) -> None:
    silent = ProgressReporter(backend, NO_PREVIEWS, (), metrics)  # type: ignore[arg-type]
    silent.start()
    track = silent.follow("task", 456)

    for step_index in range(21):
        step(track, step_index)
    track.close()
    silent.close()

    assert backend.ended == []


def test_method_that_no_progress_passes_with_is_warned_of_once(
    reporter: ProgressReporter, backend: SlowBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.answer = WebhookAttempt(WebhookResult.REJECTED, 405, None, "HTTP 405 to PATCH: set …", is_ambiguous=False)
    track = reporter.follow("task", 456)

    for step_index in (0, 5, 10):
        step(track, step_index)
        backend.next()
    track.close()

    warned = [record for record in caplog.records if record.getMessage() == "progress not taken"]
    assert [record.fields["reason"] for record in warned] == ["HTTP 405 to PATCH: set …"]  # type: ignore[attr-defined]
