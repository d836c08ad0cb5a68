"""Every copy of a job keeps the publisher's trace context, so that a later attempt is in the same trace."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from clients.webhooks import DEFAULT_SETTING, WebhookKind
from inference.errors import EngineCrashed, EngineFault
from tests.worker.jobs.test_runs import asked_for, delivered
from tests.worker.results.test_notifier import PLAIN_STORE, TAKEN, AckingConsumer, KeepingPublisher, ScriptedClient
from worker.amqp.delivery import Delivery, Origin
from worker.amqp.topology import QueueNames
from worker.breakers import Breaker, StoreGate
from worker.errors import ErrorCode
from worker.jobs.history import History
from worker.jobs.leases import Leases
from worker.jobs.recovery import SuspectIsolation
from worker.jobs.runner import JobRunner
from worker.jobs.runs import Run, Runs
from worker.jobs.settler import Settler
from worker.metrics import Metrics
from worker.results.notifier import Notifier
from worker.results.result_urls import ResultUrls
from worker.results.terminal_event import TerminalEvent, failed_event
from worker.tracing.context import NO_TRACE, TraceContext
from worker.tracing.tracing import JobAttempt, JobSpan, Tracing

NAMES = QueueNames("image_generation")
PUBLISHERS = TraceContext("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "congo=t61rcWkgMzE")
OURS = TraceContext("00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01")


def delivered_in(trace: TraceContext) -> Delivery:
    return replace(delivered(1), origin=Origin(trace=trace))


class NamedSpans(Tracing):
    """Gives every attempt the same span."""

    def begin(self, attempt: JobAttempt) -> JobSpan:
        return JobSpan(OURS)


class Rig:
    """A runner of jobs that end as scripted, and all that publishes copies of them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.worker, self._error = "here", error
        self.publisher = KeepingPublisher()
        self.client = ScriptedClient(TAKEN)
        is_draining, publisher = threading.Event(), cast("Any", self.publisher)
        self.notifier = Notifier(
            client=cast("Any", self.client),
            ledger=cast("Any", self),
            publisher=publisher,
            names=NAMES,
            metrics=Metrics(),
            breakers={DEFAULT_SETTING: Breaker("the backend", 5)},
            urls=ResultUrls(PLAIN_STORE, "media"),
            is_draining=is_draining,
        )
        self.settler = Settler(publisher, self.notifier, NAMES, SuspectIsolation(), is_draining)
        self.settler.start(cast("Any", AckingConsumer()))
        self.runs = Runs()
        self.runner = JobRunner(
            handler=cast("Any", self),
            runs=self.runs,
            settler=self.settler,
            ledger=cast("Any", self),
            notifier=self.notifier,
            publisher=publisher,
            names=NAMES,
            metrics=Metrics(),
            gate=StoreGate(Breaker("the store", 5), is_draining),
            leases=cast("Any", None),
            history=History(shows_prompts=False),
            tracing=NamedSpans(),
        )

    def handle(self, run: Run) -> TerminalEvent:
        if self._error is not None:
            raise self._error
        return failed_event(
            task_id=run.task_id,
            generation_id=456,
            code=ErrorCode.INVALID_PROMPT,
            message="empty",
            retry_count=0,
            trace=run.trace,
        )

    def record(self, event: TerminalEvent) -> TerminalEvent:
        return event

    def is_delivered(self, _event: TerminalEvent) -> bool:
        return False

    def mark_delivered(self, _event: TerminalEvent) -> None:
        """Keep nothing."""

    def put(self, _ref: object, _note: bytes, *, content_type: str) -> None:
        """Keep no note of a lease."""

    def run(self, trace: TraceContext) -> None:
        run = self.runs.attach_or_start(asked_for(), delivered_in(trace))
        assert run is not None
        self.runner.run(run, lambda *_: None)

    @property
    def copies(self) -> Iterator[tuple[str, TraceContext]]:
        return ((one.queue, one.headers["origin"].trace) for one in self.publisher.kept)


@pytest.mark.parametrize(
    ("error", "queue"), [(EngineFault("odd"), NAMES.retry(30)), (EngineCrashed("twice"), NAMES.dead)]
)
def test_a_retry_and_a_dead_letter_keep_the_publishers_context_else_they_get_the_attempts(
    error: Exception, queue: str
) -> None:
    traced, untraced = Rig(error), Rig(error)

    traced.run(PUBLISHERS)
    untraced.run(NO_TRACE)

    assert list(traced.copies) == [(queue, PUBLISHERS)]
    assert list(untraced.copies) == [(queue, OURS)]


def test_a_moved_message_and_one_that_is_no_job_keep_their_context() -> None:
    rig, delivery = Rig(), delivered_in(PUBLISHERS)

    rig.settler.move(delivery, NAMES.recover)
    rig.settler.dead_letter(delivery, "no JSON")

    assert list(rig.copies) == [(NAMES.recover, PUBLISHERS), (NAMES.dead, PUBLISHERS)]


def test_the_copy_of_a_job_on_lease_keeps_its_context() -> None:
    rig = Rig()
    leases = Leases(cast("Any", rig), "bucket", cast("Any", rig.publisher), NAMES, consumer_timeout_seconds=0.0)
    run = rig.runs.attach_or_start(asked_for(), delivered_in(PUBLISHERS))
    assert run is not None

    assert leases.take_or_renew(run)

    assert list(rig.copies) == [(NAMES.lease, PUBLISHERS)]


def test_the_webhook_of_an_end_is_told_of_the_attempt() -> None:
    rig = Rig()

    rig.run(PUBLISHERS)

    assert rig.client.sent[0].trace_headers == OURS.headers


def test_an_end_keeps_its_context_in_the_record_and_in_the_outbox() -> None:
    event = TerminalEvent("task", 456, WebhookKind.COMPLETE, {"generation_id": 456}, traceparent=OURS.traceparent)

    assert TerminalEvent.from_json(event.to_json()).webhook.trace_headers == OURS.headers


@pytest.mark.parametrize("written", ["x\r\nX-Forged: 1", "00-0-0-0", "한"])
def test_a_forged_context_in_a_record_reaches_no_webhook(written: str) -> None:
    event = TerminalEvent("task", 456, WebhookKind.COMPLETE, {"generation_id": 456}, traceparent=written)

    assert TerminalEvent.from_json(event.to_json()).webhook.trace_headers == {}
