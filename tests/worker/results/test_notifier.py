"""An event is delivered, or a confirmed copy of it is elsewhere; and the outbox goes on until it is."""

import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from clients.storage.client import Storage
from clients.storage.errors import StorageUnavailable
from clients.webhooks import DEFAULT_SETTING, Webhook, WebhookAttempt, WebhookKind, WebhookResult
from config.store import StoreSettings
from tests.support.world import HANG_SECONDS
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import PublishFailed
from worker.amqp.topology import QueueNames
from worker.breakers import BACKEND_THRESHOLD, Breaker
from worker.errors import ErrorCode
from worker.metrics import Metrics
from worker.results.notifier import MAX_AGE_SECONDS, Notifier
from worker.results.outbox import Outbox
from worker.results.result_urls import ResultUrls
from worker.results.terminal_event import TerminalEvent, failed_event

NAMES = QueueNames("image_generation")
A_MOMENT_SECONDS = 0.15
PLAIN_STORE = Storage(StoreSettings(AWS_STORAGE_BUCKET_NAME="media"))  # type: ignore[call-arg]

TAKEN = WebhookAttempt(WebhookResult.DELIVERED, 200, None, "HTTP 200", is_ambiguous=False)
FAILING = WebhookAttempt(WebhookResult.RETRY, 500, None, "HTTP 500", is_ambiguous=False)
LATER = WebhookAttempt(WebhookResult.RETRY, 503, 3600.0, "HTTP 503", is_ambiguous=False)
UNKNOWN = WebhookAttempt(WebhookResult.RETRY, 404, None, "HTTP 404", is_ambiguous=False)
REFUSED = WebhookAttempt(WebhookResult.REJECTED, 422, None, "HTTP 422", is_ambiguous=False)
FORBIDDEN = WebhookAttempt(WebhookResult.RETRY, 403, None, "HTTP 403", is_ambiguous=False)
BROKEN = WebhookAttempt(WebhookResult.RETRY, None, None, "the connection broke", is_ambiguous=True)


class ScriptedClient:
    """Answers with its script, one attempt after the other, and with the last for ever."""

    def __init__(self, *script: WebhookAttempt) -> None:
        self.script = list(script)
        self.sent: list[Webhook] = []

    def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
        assert 0 < deadline_seconds <= 20
        self.sent.append(webhook)
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    @property
    def ids(self) -> list[str]:
        return [webhook.webhook_id for webhook in self.sent]


class HeldClient(ScriptedClient):
    """Keeps each call waiting until it is let go."""

    def __init__(self, *script: WebhookAttempt) -> None:
        super().__init__(*script)
        self.is_free = threading.Event()

    def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
        attempt = super().send(webhook, deadline_seconds=deadline_seconds)
        assert self.is_free.wait(HANG_SECONDS)
        return attempt


class NotingLedger:
    """Marks of delivered events: by us, or in `delivered_elsewhere` by another worker."""

    def __init__(self) -> None:
        self.marked: list[TerminalEvent] = []
        self.delivered_elsewhere: list[TerminalEvent] = []

    def is_delivered(self, event: TerminalEvent) -> bool:
        return event in self.delivered_elsewhere

    def mark_delivered(self, event: TerminalEvent) -> None:
        self.marked.append(event)


class UnavailableLedger(NotingLedger):
    """Its store does not answer."""

    def record_late(self, event: TerminalEvent) -> TerminalEvent | None:
        raise StorageUnavailable("away")


@dataclass
class Published:
    queue: str
    body: bytes
    headers: dict[str, Any]


@dataclass
class KeepingPublisher:
    """Keeps what is published, or confirms nothing, or nothing that goes to `full_queue`."""

    is_down: bool = False
    full_queue: str = ""
    num_calls: int = 0
    kept: list[Published] = field(default_factory=list)

    def publish(self, queue_name: str, body: bytes, **headers: Any) -> None:
        self.num_calls += 1
        if self.is_down or queue_name == self.full_queue:
            raise PublishFailed("the broker is gone")
        self.kept.append(Published(queue_name, body, headers))


class AckingConsumer:
    """Hands over each delivery that was acked. What came in a session before `session` is not its any more."""

    def __init__(self) -> None:
        self.acked: queue.Queue[Delivery] = queue.Queue()
        self.session = 1

    def holds(self, delivery: Delivery) -> bool:
        return delivery.session >= self.session

    def ack(self, delivery: Delivery) -> None:
        self.acked.put(delivery)

    def next_tags(self, count: int) -> set[int]:
        return {self.acked.get(timeout=HANG_SECONDS).tag for _ in range(count)}


class ImpatientEvent(threading.Event):
    """Never set, and over at once: what would have been waited is only noted."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        return False


@dataclass
class Parts:
    """A notifier and everything around it."""

    client: ScriptedClient
    ledger: NotingLedger = field(default_factory=NotingLedger)
    publisher: KeepingPublisher = field(default_factory=KeepingPublisher)
    consumer: AckingConsumer = field(default_factory=AckingConsumer)
    metrics: Metrics = field(default_factory=Metrics)
    breakers: defaultdict[str, Breaker] = field(
        default_factory=lambda: defaultdict(lambda: Breaker("the backend", BACKEND_THRESHOLD))
    )
    is_draining: threading.Event = field(default_factory=ImpatientEvent)

    def __post_init__(self) -> None:
        self.notifier = Notifier(
            client=self.client,  # type: ignore[arg-type]
            urls=ResultUrls(PLAIN_STORE, "media"),
            ledger=self.ledger,  # type: ignore[arg-type]
            publisher=self.publisher,  # type: ignore[arg-type]
            names=NAMES,
            metrics=self.metrics,
            breakers=self.breakers,
            is_draining=self.is_draining,
        )
        self.outbox = Outbox(self.notifier, self.ledger, self.publisher, NAMES)  # type: ignore[arg-type]


def failed(task_id: str = "task") -> TerminalEvent:
    return failed_event(task_id=task_id, generation_id=456, code=ErrorCode.GPU_OOM, message="too large", retry_count=0)


def complete(task_id: str = "task") -> TerminalEvent:
    return TerminalEvent(task_id, 456, WebhookKind.COMPLETE, {"generation_id": 456, "result_url": "https://a"})


# --- The notifier


def test_a_delivered_event_is_marked_and_goes_nowhere_else() -> None:
    parts = Parts(ScriptedClient(TAKEN))

    assert parts.notifier.notify(complete()) == "delivered"

    assert parts.client.ids == ["task:complete"]
    assert parts.ledger.marked == [complete()]
    assert parts.publisher.kept == []


def test_an_event_known_to_be_delivered_is_not_sent_again() -> None:
    parts = Parts(ScriptedClient(TAKEN))

    assert parts.notifier.notify(replace(complete(), is_delivered=True)) == "known"

    assert parts.client.sent == []
    assert parts.ledger.marked == []


def test_a_backend_that_fails_twice_is_tried_again_under_the_same_id_after_growing_waits() -> None:
    waits = ImpatientEvent()
    parts = Parts(ScriptedClient(FAILING, BROKEN, TAKEN), is_draining=waits)

    assert parts.notifier.notify(complete()) == "delivered"

    assert parts.client.ids == ["task:complete"] * 3
    assert waits.waits == [pytest.approx(1.0, rel=0.2), pytest.approx(5.0, rel=0.2)]
    assert parts.ledger.marked == [complete()]


def test_event_delivered_by_another_holder_is_not_retried() -> None:
    parts = Parts(ScriptedClient(FAILING))
    parts.ledger.delivered_elsewhere.append(complete())

    assert parts.notifier.notify(complete()) == "known"

    assert len(parts.client.sent) == 1
    assert parts.publisher.kept == []


def test_patience_ends_before_the_third_wait_and_the_event_is_parked() -> None:
    waits = ImpatientEvent()
    parts = Parts(ScriptedClient(FAILING), is_draining=waits)
    before = time.time()

    assert parts.notifier.notify(complete()) == "parked"

    assert len(parts.client.sent) == 3
    assert len(waits.waits) == 2
    (parked,) = parts.publisher.kept
    assert parked.queue == NAMES.outbox
    assert TerminalEvent.from_json(parked.body) == complete()
    assert (parked.headers["attempt"], parked.headers["reason"]) == (4, "HTTP 500")
    assert before <= parked.headers["since"] <= time.time()
    assert parts.ledger.marked == []


def test_retry_after_of_an_hour_is_not_waited_for() -> None:
    parts = Parts(ScriptedClient(LATER))

    assert parts.notifier.notify(complete()) == "parked"

    assert len(parts.client.sent) == 1


def test_a_worker_that_stops_parks_at_once() -> None:
    is_draining = threading.Event()
    is_draining.set()
    parts = Parts(ScriptedClient(FAILING), is_draining=is_draining)

    assert parts.notifier.notify(complete()) == "parked"

    assert len(parts.client.sent) == 1


def test_a_refused_event_is_a_dead_letter_with_its_reason() -> None:
    parts = Parts(ScriptedClient(REFUSED))

    assert parts.notifier.notify(failed()) == "refused"

    (dead,) = parts.publisher.kept
    assert dead.queue == NAMES.dead
    assert TerminalEvent.from_json(dead.body) == failed()
    assert "422" in dead.headers["reason"]
    assert "failed" in dead.headers["reason"]
    assert len(parts.client.sent) == 1
    assert parts.ledger.marked == []


def test_a_kind_that_was_just_parked_gets_one_try_until_one_is_taken() -> None:
    # Given a backend that chokes on every `failed`
    parts = Parts(ScriptedClient(FAILING))
    parts.notifier.notify(failed("first"))
    parts.client.sent.clear()

    # When the next of that kind is told, and one of the other kind
    assert parts.notifier.notify(failed("second")) == "parked"
    tries_of_failed = len(parts.client.sent)
    assert parts.notifier.notify(complete()) == "parked"
    tries_of_complete = len(parts.client.sent) - tries_of_failed

    # Then only the other kind is worth patience
    assert (tries_of_failed, tries_of_complete) == (1, 3)

    # And once one is taken, patience is back
    parts.client.script = [TAKEN, FAILING]
    parts.notifier.notify(failed("third"))
    parts.client.sent.clear()
    parts.notifier.notify(failed("fourth"))
    assert len(parts.client.sent) == 3


@pytest.mark.parametrize("attempt", [FAILING, REFUSED])
def test_event_that_cannot_be_parked_is_returned_to_the_caller(attempt: WebhookAttempt) -> None:
    parts = Parts(ScriptedClient(attempt), publisher=KeepingPublisher(is_down=True))

    with pytest.raises(PublishFailed):
        parts.notifier.notify(complete())

    assert parts.ledger.marked == []


def test_attempts_are_counted_by_kind_and_result_and_lost_answers_apart() -> None:
    parts = Parts(ScriptedClient(BROKEN, TAKEN))

    parts.notifier.notify(complete())

    def count(name: str, **labels: str) -> float | None:
        return parts.metrics.registry.get_sample_value(name, labels)

    assert count("darkroom_webhooks_total", kind="complete", result="retry") == 1
    assert count("darkroom_webhooks_total", kind="complete", result="delivered") == 1
    assert count("darkroom_webhook_ambiguous_total") == 1


# --- The outbox


def delivered(
    body: bytes, tag: int = 1, *, age_seconds: float = 0.0, session: int = 1, due_in_seconds: float = 0.0
) -> Delivery:
    return Delivery(
        body=body,
        queue=NAMES.outbox,
        is_redelivered=False,
        attempt=2,
        num_deliveries=0,
        since=time.time() - age_seconds,
        session=session,
        tag=tag,
        channel_number=3,
        due=time.time() + due_in_seconds,
    )


@pytest.fixture
def started() -> Iterator[Callable[[Parts], Parts]]:
    """Start the outbox of the given parts, and close it in the end."""
    running: list[Parts] = []

    def start(parts: Parts) -> Parts:
        running.append(parts)
        parts.outbox.start(parts.consumer)  # type: ignore[arg-type]
        return parts

    yield start
    for parts in running:
        parts.publisher.is_down, parts.publisher.full_queue = False, ""
        parts.outbox.close()


Start = Callable[[Parts], Parts]


def no_ack_within_a_moment(parts: Parts) -> bool:
    try:
        parts.consumer.acked.get(timeout=A_MOMENT_SECONDS)
    except queue.Empty:
        return True
    return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("event", [complete(), failed()])
def test_a_parked_event_is_delivered_marked_and_then_acked(started: Start, event: TerminalEvent) -> None:
    parts = started(Parts(ScriptedClient(TAKEN)))

    parts.outbox.on_delivery(delivered(event.to_json(), tag=7))

    assert parts.consumer.next_tags(1) == {7}
    assert parts.ledger.marked == [event]
    assert parts.client.ids == [f"task:{event.kind.value}"]
    assert parts.publisher.kept == []


def test_event_delivered_by_another_worker_is_acked_without_a_call(started: Start) -> None:
    parts = Parts(ScriptedClient(TAKEN))
    parts.ledger.delivered_elsewhere.append(failed())
    started(parts)

    parts.outbox.on_delivery(delivered(failed().to_json(), tag=7))

    assert parts.consumer.next_tags(1) == {7}
    assert parts.client.ids == []


@pytest.mark.parametrize(("attempt", "age_seconds"), [(UNKNOWN, 61.0), (REFUSED, 0.0), (FAILING, MAX_AGE_SECONDS + 1)])
def test_hopeless_event_is_dead_lettered_and_acked(started: Start, attempt: WebhookAttempt, age_seconds: float) -> None:
    parts = started(Parts(ScriptedClient(attempt)))

    parts.outbox.on_delivery(delivered(failed().to_json(), age_seconds=age_seconds))

    assert parts.consumer.next_tags(1) == {1}
    (dead,) = parts.publisher.kept
    assert (dead.queue, dead.body) == (NAMES.dead, failed().to_json())
    assert str(attempt.status) in dead.headers["reason"]
    assert parts.ledger.marked == []


@pytest.mark.parametrize(("attempt", "age_seconds"), [(UNKNOWN, 30.0), (FAILING, 3600.0)])
def test_event_that_may_succeed_stays_in_the_outbox(
    started: Start, attempt: WebhookAttempt, age_seconds: float
) -> None:
    parts = started(Parts(ScriptedClient(attempt)))

    parts.outbox.on_delivery(delivered(complete().to_json(), age_seconds=age_seconds))
    until(lambda: len(parts.client.sent) == 1)

    assert no_ack_within_a_moment(parts)
    assert len(parts.client.sent) == 1  # the next attempt is a second away
    assert parts.publisher.kept == []


def test_waiting_event_delays_no_other_and_is_sent_with_the_first_accepted(started: Start) -> None:
    # Given an event that the backend wants to hear of in an hour, and nothing else
    parts = started(Parts(ScriptedClient(TAKEN, TAKEN)))
    parts.outbox.on_delivery(delivered(complete("late").to_json(), tag=1, due_in_seconds=3600))
    assert no_ack_within_a_moment(parts)

    # When another comes, it is told; and as the backend listens, so is the first
    parts.outbox.on_delivery(delivered(complete("now").to_json(), tag=2))

    assert parts.consumer.next_tags(2) == {1, 2}
    assert parts.client.ids == ["now:complete", "late:complete"]


def test_one_success_releases_the_whole_kind_queue_and_resets_the_waits(started: Start) -> None:
    # Given four parked events, and a backend that fails once, then takes three, and fails once more
    parts = started(Parts(ScriptedClient(FAILING, TAKEN, TAKEN, TAKEN, FAILING, TAKEN)))
    for tag in range(1, 5):
        parts.outbox.on_delivery(delivered(complete(f"task-{tag}").to_json(), tag=tag))

    # When the lane's turn comes again
    first = parts.consumer.next_tags(1)
    came_at = time.monotonic()
    others = parts.consumer.next_tags(2)

    # Then one after the other goes through without a wait between them
    assert time.monotonic() - came_at < 0.9

    # And the next failure costs a second, not the five that a second one in a row costs
    last = parts.consumer.next_tags(1)
    assert time.monotonic() - came_at < 4
    assert first | others | last == {1, 2, 3, 4}
    assert len(parts.client.sent) == 6


def test_kind_that_the_backend_fails_on_does_not_delay_the_other(started: Start) -> None:
    class FailingKindClient(ScriptedClient):
        def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
            super().send(webhook, deadline_seconds=deadline_seconds)
            return FAILING if webhook.kind is WebhookKind.FAILED else TAKEN

    parts = started(Parts(FailingKindClient(TAKEN)))

    parts.outbox.on_delivery(delivered(failed("first").to_json(), tag=1))
    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=2))

    assert parts.consumer.next_tags(1) == {2}
    assert no_ack_within_a_moment(parts)


class SelectiveClient(ScriptedClient):
    """Takes every event but those of the tasks in `bad`."""

    def __init__(self, bad: dict[str, WebhookAttempt]) -> None:
        super().__init__(TAKEN)
        self._bad = bad

    def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
        taken = super().send(webhook, deadline_seconds=deadline_seconds)
        return self._bad.get(webhook.webhook_id.partition(":")[0], taken)


@pytest.mark.parametrize("bad", [FAILING, LATER, UNKNOWN, BROKEN], ids=lambda bad: bad.reason)
def test_events_never_taken_do_not_delay_others_of_their_kind(started: Start, bad: WebhookAttempt) -> None:
    parts = started(Parts(SelectiveClient({f"bad-{number}": bad for number in range(3)})))
    for number in range(3):
        parts.outbox.on_delivery(delivered(complete(f"bad-{number}").to_json(), tag=number))
    until(lambda: len(parts.client.sent) == 3)

    for number in range(3):
        parts.outbox.on_delivery(delivered(complete(f"good-{number}").to_json(), tag=10 + number))

    assert parts.consumer.next_tags(3) == {10, 11, 12}
    assert no_ack_within_a_moment(parts)


def test_event_that_times_out_delays_no_other_once_some_are_taken(started: Start) -> None:
    # Given a backend that takes events, and one that it answers with silence
    class SilentOnOne(ScriptedClient):
        is_free = threading.Event()

        def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
            taken = super().send(webhook, deadline_seconds=deadline_seconds)
            if webhook.webhook_id.startswith("bad"):
                assert self.is_free.wait(HANG_SECONDS)
            return taken

    client = SilentOnOne(TAKEN)
    parts = started(Parts(client))
    parts.outbox.on_delivery(delivered(complete("good").to_json(), tag=1))
    assert parts.consumer.next_tags(1) == {1}
    parts.outbox.on_delivery(delivered(complete("bad").to_json(), tag=2))
    until(lambda: "bad:complete" in client.ids)

    # Then those behind it are told
    for tag in range(3, 6):
        parts.outbox.on_delivery(delivered(complete(f"good-{tag}").to_json(), tag=tag))
    assert parts.consumer.next_tags(3) == {3, 4, 5}
    client.is_free.set()
    assert parts.consumer.next_tags(1) == {2}


def test_end_delivered_by_a_job_s_own_thread_releases_the_kind_queue(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.results.event_pool.SWEEP_SECONDS", 0.05)
    parts = started(Parts(ScriptedClient(TAKEN)))
    parts.outbox.on_delivery(delivered(complete("late").to_json(), tag=1, due_in_seconds=3600))
    assert no_ack_within_a_moment(parts)

    parts.notifier.notify(complete("now"))

    assert parts.consumer.next_tags(1) == {1}


def test_failed_event_goes_to_the_tail_of_the_queue_when_the_prefetch_is_full(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.results.outbox.PREFETCH", 2)
    parts = started(Parts(ScriptedClient(LATER)))
    parts.outbox.on_delivery(delivered(failed("first").to_json(), tag=1, due_in_seconds=3600))
    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=2, age_seconds=60))

    # A confirmed copy comes first, which knows how old it is, how often it was tried, why in vain, and when it is due.
    assert parts.consumer.next_tags(1) == {2}
    (back,) = parts.publisher.kept
    assert (back.queue, TerminalEvent.from_json(back.body)) == (NAMES.outbox, complete("second"))
    assert (back.headers["attempt"], back.headers["reason"]) == (3, "HTTP 503")
    assert back.headers["since"] == pytest.approx(time.time() - 60, abs=5)
    assert back.headers["due"] == pytest.approx(time.time() + 3600, rel=0.2, abs=800)
    assert no_ack_within_a_moment(parts)


def test_event_over_a_day_old_is_dead_lettered_however_far_its_next_turn(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.results.event_pool.SWEEP_SECONDS", 0.05)
    parts = started(Parts(ScriptedClient(LATER)))
    parts.outbox.on_delivery(delivered(complete().to_json(), age_seconds=MAX_AGE_SECONDS - 0.5))

    assert parts.consumer.next_tags(1) == {1}
    assert len(parts.client.sent) == 1
    (dead,) = parts.publisher.kept
    assert dead.queue == NAMES.dead
    assert "503" in dead.headers["reason"]


def test_old_event_not_tried_here_yet_is_sent_and_not_dead_lettered(started: Start) -> None:
    # All workers were away over the week-end.
    parts = started(Parts(ScriptedClient(TAKEN)))
    parts.outbox.on_delivery(delivered(complete().to_json(), age_seconds=2 * MAX_AGE_SECONDS))

    assert parts.consumer.next_tags(1) == {1}
    assert parts.publisher.kept == []


def sendable(**changes: Any) -> bytes:
    return replace(complete(), **changes).to_json()


UNREADABLE = {
    "empty": b"",
    "no json": b"{",
    "no utf-8": b"\xff\xfe",
    "a list": b"[]",
    "a job": b'{"data": {"generation_id": 1, "prompt": "a"}}',
    "nested": b"[" * 100_000,
    # What one thread can just read another may not be able to write.
    "nested within Python's limit": sendable(body={"generation_id": 456, "x": [json.loads("[" * 200 + "]" * 200)]}),
    "progress": sendable(kind=WebhookKind.PROGRESS),
    "body list": sendable(body=[1]),
    "body nan": sendable(body={"generation_id": float("nan")}),
    "task_id": sendable(task_id="two words"),
}


def test_backlog_counts_unsettled_events_with_the_one_being_sent(started: Start) -> None:
    # Given a backend that has not answered yet
    client = HeldClient(TAKEN)
    parts = started(Parts(client))
    assert parts.outbox.backlog() == (0, 0.0)

    # When one event is being told and another waits behind it
    parts.outbox.on_delivery(delivered(complete("first").to_json(), tag=1, age_seconds=600))
    until(lambda: client.ids == ["first:complete"])
    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=2, age_seconds=60))

    # Then both count, with the age of the older one, until they are delivered
    assert parts.outbox.backlog() == (2, pytest.approx(600, abs=5))
    client.is_free.set()
    assert parts.consumer.next_tags(2) == {1, 2}
    parts.outbox.close()
    assert parts.outbox.backlog() == (0, 0.0)


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_unreadable_event_is_dead_lettered_and_the_outbox_goes_on(started: Start, body: bytes) -> None:
    parts = started(Parts(ScriptedClient(TAKEN)))

    parts.outbox.on_delivery(delivered(body, tag=1))
    parts.outbox.on_delivery(delivered(failed().to_json(), tag=2))
    parts.outbox.on_delivery(delivered(complete().to_json(), tag=3))

    assert parts.consumer.next_tags(3) == {1, 2, 3}
    (dead,) = parts.publisher.kept
    assert (dead.queue, dead.body) == (NAMES.dead, body)
    assert dead.headers["reason"]


def test_event_that_cannot_be_dead_lettered_now_stays_in_the_outbox(started: Start) -> None:
    parts = started(Parts(ScriptedClient(REFUSED), publisher=KeepingPublisher(is_down=True)))

    parts.outbox.on_delivery(delivered(complete().to_json()))
    until(lambda: parts.publisher.num_calls == 1)

    assert no_ack_within_a_moment(parts)


def test_events_refused_by_a_full_dead_letter_queue_delay_no_other(started: Start) -> None:
    # Given several events that the backend refuses for good
    client = SelectiveClient({f"bad-{number}": REFUSED for number in range(1, 9)})
    parts = started(Parts(client, publisher=KeepingPublisher(full_queue=NAMES.dead)))
    for number in range(1, 9):
        parts.outbox.on_delivery(delivered(complete(f"bad-{number}").to_json(), tag=number))
    until(lambda: len(parts.client.sent) >= 4)

    # When more come
    parts.outbox.on_delivery(delivered(complete("good-1").to_json(), tag=21))
    parts.outbox.on_delivery(delivered(complete("good-2").to_json(), tag=22))

    # Then these are told at once, and the others are asked with now and then, and stay with the broker
    assert parts.consumer.next_tags(2) == {21, 22}
    assert no_ack_within_a_moment(parts)
    assert len(parts.client.sent) <= 8 + 2


def test_unreadable_event_that_cannot_be_dead_lettered_keeps_no_other_from_the_tail_of_the_queue(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.results.kind_queue.MAX_HELD_SECONDS", 0.05)
    monkeypatch.setattr("worker.results.event_pool.SWEEP_SECONDS", 0.05)
    parts = started(Parts(ScriptedClient(LATER), publisher=KeepingPublisher(full_queue=NAMES.dead)))

    parts.outbox.on_delivery(delivered(b"unreadable", tag=1))
    parts.outbox.on_delivery(delivered(failed().to_json(), tag=2, due_in_seconds=3600))

    assert parts.consumer.next_tags(1) == {2}


def test_an_event_of_a_lost_session_is_copied_nowhere(started: Start) -> None:
    # The broker has given it to somebody, and a copy for each lost connection would fill the queues.
    parts = started(Parts(ScriptedClient(REFUSED)))
    parts.consumer.session = 2
    parts.outbox.on_delivery(delivered(complete("lost").to_json(), tag=1, session=1))
    until(lambda: len(parts.client.sent) == 1)
    parts.outbox.on_delivery(delivered(complete("ours").to_json(), tag=2, session=2))

    assert parts.consumer.next_tags(1) == {2}
    assert [TerminalEvent.from_json(dead.body).task_id for dead in parts.publisher.kept] == ["ours"]


def test_ends_waiting_for_the_store_do_not_fill_the_prefetch(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.results.outbox.PREFETCH", 1)
    parts = started(Parts(ScriptedClient(TAKEN), ledger=UnavailableLedger()))
    parts.outbox.on_delivery(delivered(sendable(is_recorded=False), tag=1))

    assert parts.consumer.next_tags(1) == {1}
    (back,) = parts.publisher.kept
    assert back.queue == NAMES.outbox
    assert back.headers["due"] > time.time() + 5


def test_an_end_refused_again_and_again_for_its_token_keeps_no_worker_from_its_jobs(started: Start) -> None:
    # A firewall's rule may answer 403 to one body, and that one is tried for a day.
    parts = Parts(ScriptedClient(FORBIDDEN))
    for _ in range(2 * BACKEND_THRESHOLD):
        parts.notifier.send_once(complete("one"))
    breaker = parts.breakers[DEFAULT_SETTING]
    assert breaker.reason == ""

    for number in range(BACKEND_THRESHOLD):
        parts.notifier.send_once(complete(f"other-{number}"))
    assert breaker.reason == "the backend refuses this worker: HTTP 403 at BACKEND_API_URL"


def test_unreadable_event_that_cannot_be_dead_lettered_is_not_retried_in_a_hot_loop(started: Start) -> None:
    parts = started(Parts(ScriptedClient(TAKEN), publisher=KeepingPublisher(is_down=True)))

    parts.outbox.on_delivery(delivered(b"unreadable"))
    until(lambda: parts.publisher.num_calls > 0)

    assert no_ack_within_a_moment(parts)
    assert parts.publisher.num_calls <= 2


def test_a_delivery_of_a_new_session_takes_the_place_of_the_lost_one(started: Start) -> None:
    # Given a busy lane with an event behind the one that is being sent
    client = HeldClient(TAKEN)
    parts = started(Parts(client))
    parts.outbox.on_delivery(delivered(complete("first").to_json(), tag=1))
    until(lambda: len(client.sent) == 1)
    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=2))

    # When the connection was lost, and the broker delivers that one again
    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=9, session=2))
    client.is_free.set()

    # Then it is sent once, and its new delivery is acked
    until(lambda: 9 in parts.consumer.next_tags(1))
    assert no_ack_within_a_moment(parts)
    assert client.ids == ["first:complete", "second:complete"]


def test_two_copies_of_an_event_are_both_acked(started: Start) -> None:
    # A task delivered twice may be parked twice; a copy never acked holds the channel until the broker closes it.
    client = HeldClient(TAKEN)
    parts = started(Parts(client))
    parts.outbox.on_delivery(delivered(complete("first").to_json(), tag=1))
    until(lambda: len(client.sent) == 1)

    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=2))
    parts.outbox.on_delivery(delivered(complete("second").to_json(), tag=3))
    client.is_free.set()

    assert parts.consumer.next_tags(3) == {1, 2, 3}


def test_a_copy_that_comes_while_the_first_is_being_sent_is_acked_too(started: Start) -> None:
    client = HeldClient(FAILING, TAKEN)
    parts = started(Parts(client))
    parts.outbox.on_delivery(delivered(complete().to_json(), tag=1))
    until(lambda: len(client.sent) == 1)

    parts.outbox.on_delivery(delivered(complete().to_json(), tag=2))
    client.is_free.set()

    assert parts.consumer.next_tags(2) == {1, 2}


def test_closing_makes_no_further_attempt(started: Start) -> None:
    # A backend that hangs would hold the shutdown for the length of a call.
    parts = started(Parts(ScriptedClient(FAILING)))
    parts.outbox.on_delivery(delivered(complete().to_json()))
    until(lambda: len(parts.client.sent) == 1)

    parts.outbox.close()

    assert len(parts.client.sent) == 1
    assert no_ack_within_a_moment(parts)


def test_an_unreadable_event_does_not_bring_another_one_s_turn_forward(started: Start) -> None:
    parts = started(Parts(ScriptedClient(FAILING)))
    parts.outbox.on_delivery(delivered(failed().to_json(), tag=1))
    until(lambda: len(parts.client.sent) == 1)

    parts.outbox.on_delivery(delivered(b"unreadable", tag=2))

    assert parts.consumer.next_tags(1) == {2}
    assert no_ack_within_a_moment(parts)
    assert len(parts.client.sent) == 1
