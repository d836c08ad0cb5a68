"""Telling the backend how a job ended: at once where it listens, out of the outbox where it does not."""

import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import tenacity

from clients.webhooks import Attempt, Verdict, WebhookClient, WebhookKind
from config.logs import bind, log_event
from worker.broker import Consumer, Delivery, Publisher, PublishFailed
from worker.events import TerminalEvent
from worker.ledger import Ledger
from worker.metrics import Metrics
from worker.queues import QueueNames

logger = logging.getLogger(__name__)

CALL_DEADLINE_SECONDS = 20.0
CLOSE_SECONDS = 2.0
DELAYS_SECONDS = (1.0, 5.0, 15.0, 30.0)
# A job's thread and its place in the prefetch are worth more than patience: the outbox is just as durable.
PATIENCE_SECONDS = 10.0
MAX_AGE_SECONDS = 24 * 3600.0
# A backend may publish before its transaction commits: it does not know the generation yet, but will soon.
UNKNOWN_IS_TRANSIENT_SECONDS = 60.0
# Well under the broker's consumer timeout (30 minutes by default), after which it would close the channel.
MAX_HELD_SECONDS = 600.0
SWEEP_SECONDS = 5.0
TERMINAL_KINDS = (WebhookKind.COMPLETE, WebhookKind.FAILED)


def delay_after(num_attempts: int, retry_after_seconds: float | None) -> float:
    """Seconds to wait after the `num_attempts`-th attempt (1-based), before jitter. Pure."""
    planned = DELAYS_SECONDS[min(num_attempts, len(DELAYS_SECONDS)) - 1]
    return max(planned, retry_after_seconds or 0.0)


def is_hopeless(attempt: Attempt, age_seconds: float) -> bool:
    """Whether an event of that age should go to the dead letters after `attempt`. Pure."""
    if attempt.verdict is Verdict.REJECTED or age_seconds > MAX_AGE_SECONDS:
        return True
    return attempt.status == 404 and age_seconds > UNKNOWN_IS_TRANSIENT_SECONDS


class Notifier:
    """Makes sure that an event is either delivered or confirmed elsewhere. Thread-safe."""

    def __init__(
        self,
        *,
        client: WebhookClient,
        ledger: Ledger,
        publisher: Publisher,
        names: QueueNames,
        metrics: Metrics,
        is_draining: threading.Event,
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._metrics = metrics
        self._is_draining = is_draining
        # Kinds that were just parked: the next event of such a kind gets one try, not ten seconds of them.
        self._failing: set[WebhookKind] = set()

    def tell(self, event: TerminalEvent) -> str:
        """Deliver `event`, or park it; say which. Raises `PublishFailed` where neither was possible."""
        if event.is_delivered:
            return "known"
        attempts: list[Attempt] = []
        last = self._try_patiently(event, attempts)
        if last.verdict is Verdict.DELIVERED:
            self._ledger.mark_delivered(event)
            return "delivered"
        if last.verdict is Verdict.REJECTED:
            self.bury(event.to_json(), f"the backend refused the {event.kind.value} webhook: {last.reason}")
            return "refused"

        self._failing.add(event.kind)
        self._publisher.publish(
            self._names.outbox, event.to_json(), attempt=len(attempts) + 1, reason=last.reason, since=time.time()
        )
        log_event(logger, "webhook parked", logging.WARNING, kind=event.kind.value, reason=last.reason)
        return "parked"

    def attempt(self, event: TerminalEvent) -> Attempt:
        """One attempt at delivering `event`, counted."""
        attempt = self._client.send(event.webhook, deadline_seconds=CALL_DEADLINE_SECONDS)
        self._metrics.webhooks.labels(event.kind.value, attempt.verdict.name.lower()).inc()
        if attempt.is_ambiguous:
            self._metrics.webhooks_ambiguous.inc()
        if attempt.verdict is Verdict.DELIVERED:
            self._failing.discard(event.kind)
        return attempt

    def bury(self, body: bytes, reason: str) -> None:
        """Leave a confirmed copy of an event or a job with the dead letters. Raises `PublishFailed`."""
        self._publisher.publish(self._names.dead, body, reason=reason)
        log_event(logger, "dead letter", logging.ERROR, reason=reason)

    def _try_patiently(self, event: TerminalEvent, attempts: list[Attempt]) -> Attempt:
        def once() -> Attempt:
            attempts.append(self.attempt(event))
            return attempts[-1]

        patience = 0.0 if event.kind in self._failing else PATIENCE_SECONDS
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda attempt: attempt.verdict is Verdict.RETRY),
            wait=lambda state: _jittered(delay_after(state.attempt_number, attempts[-1].retry_after_seconds)),
            stop=tenacity.stop_before_delay(patience) | tenacity.stop_when_event_set(self._is_draining),
            sleep=tenacity.sleep_using_event(self._is_draining),
            retry_error_callback=lambda _state: attempts[-1],
        )
        return tries(once)


@dataclass(slots=True)
class _Parked:
    """An event in hand out of the outbox; the broker keeps it until it is settled."""

    event: TerminalEvent
    delivery: Delivery
    attempt: int
    held_since: float = field(default_factory=time.monotonic)


class Outbox:
    """Goes on delivering parked events, a lane and a thread for each kind, until the backend takes them or a day ends.

    A lane tries its events in turn and waits longer after each failure in a row, whichever event failed: a backend
    that is down is asked once every half minute, and one success lets the whole lane through. An event the backend
    always chokes on costs the others no more than its turn.
    """

    def __init__(self, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames) -> None:
        self._lanes = {kind: _Lane(kind, notifier, ledger, publisher, names) for kind in TERMINAL_KINDS}
        self._notifier = notifier
        self.consumer: Consumer | None = None

    def start(self, consumer: Consumer) -> None:
        for lane in self._lanes.values():
            lane.start(consumer)

    def close(self) -> None:
        """End the threads; what is in hand stays with the broker."""
        for lane in self._lanes.values():
            lane.close()

    def on_delivery(self, delivery: Delivery) -> None:
        """Take an event out of the outbox. Runs on the consuming thread."""
        try:
            event = TerminalEvent.from_json(delivery.body)
        except ValueError as error:
            self._lanes[WebhookKind.FAILED].refuse(delivery, str(error))
            return
        self._lanes[event.kind].add(_Parked(event, delivery, delivery.attempt))


class _Lane:
    """The parked events of one kind and the thread that delivers them."""

    def __init__(
        self, kind: WebhookKind, notifier: Notifier, ledger: Ledger, publisher: Publisher, names: QueueNames
    ) -> None:
        self._notifier = notifier
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._changed = threading.Condition()
        self._parked: deque[_Parked] = deque()
        self._unreadable: deque[tuple[Delivery, str]] = deque()
        self._num_failures = 0
        self._due_at = 0.0
        self._is_closing = False
        self._consumer: Consumer | None = None
        self._thread = threading.Thread(target=self._run, name=f"outbox-{kind.value}", daemon=True)

    def start(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def add(self, parked: _Parked) -> None:
        with self._changed:
            # A redelivery after a lost connection replaces the copy whose tag died with it.
            replaced = [known for known in self._parked if known.event.task_id == parked.event.task_id]
            for known in replaced:
                self._parked.remove(known)
            self._parked.append(parked)
            self._changed.notify_all()
        # Of the same session it was another copy of the event; a tag of a lost session is never sent.
        for known in replaced:
            self._ack(known.delivery)

    def refuse(self, delivery: Delivery, reason: str) -> None:
        with self._changed:
            self._unreadable.append((delivery, reason))
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._bury_unreadable()
                self._return_stale()
                self._try_next()
            except PublishFailed as error:
                log_event(logger, "outbox keeps its events", logging.WARNING, reason=str(error))
                self._wait_longer(None)
                self._pause()

    def _try_next(self) -> None:
        parked = self._take()
        if parked is None:
            return
        with bind(task_id=parked.event.task_id, generation_id=parked.event.generation_id):
            try:
                self._try(parked)
            except PublishFailed:
                self._keep(parked)
                raise

    def _take(self) -> _Parked | None:
        """The next event if its turn comes within `SWEEP_SECONDS`."""
        with self._changed:
            self._changed.wait_for(self._has_work, timeout=self._seconds_to_wait())
            return self._parked.popleft() if self._is_due() and not self._is_closing else None

    def _is_due(self) -> bool:
        return bool(self._parked) and time.monotonic() >= self._due_at

    def _has_work(self) -> bool:
        return self._is_closing or bool(self._unreadable) or self._is_due()

    def _pause(self) -> None:
        """Wait for the lane's next turn: a broker that confirms nothing is not asked in a loop."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, timeout=max(self._due_at - time.monotonic(), 0.0))

    def _seconds_to_wait(self) -> float:
        until_due = self._due_at - time.monotonic() if self._parked else SWEEP_SECONDS
        return min(max(until_due, 0.0), SWEEP_SECONDS)

    def _return_stale(self) -> None:
        """Put events held too long back at the tail of the outbox, so that others behind them get a turn."""
        with self._changed:
            stale = [parked for parked in self._parked if time.monotonic() - parked.held_since > MAX_HELD_SECONDS]
        for parked in stale:
            delivery = parked.delivery
            self._publisher.publish(self._names.outbox, delivery.body, attempt=parked.attempt, since=delivery.since)
            with self._changed:
                if parked in self._parked:  # else a redelivery took its place meanwhile
                    self._parked.remove(parked)
            self._ack(delivery)

    def _try(self, parked: _Parked) -> None:
        # After a lost connection another holder of this event may have been quicker.
        if self._ledger.is_delivered(parked.event):
            self._ack(parked.delivery)
            return
        attempt = self._notifier.attempt(parked.event)
        if attempt.verdict is Verdict.DELIVERED:
            self._num_failures, self._due_at = 0, 0.0
            self._ledger.mark_delivered(parked.event)
            log_event(logger, "webhook delivered late", kind=parked.event.kind.value, attempt=parked.attempt)
            self._ack(parked.delivery)
        elif is_hopeless(attempt, time.time() - parked.delivery.since):
            reason = f"the {parked.event.kind.value} webhook was not taken: {attempt.reason}"
            self._notifier.bury(parked.delivery.body, reason)
            self._ack(parked.delivery)
        else:
            self._wait_longer(attempt.retry_after_seconds)
            parked.attempt += 1
            self._keep(parked)

    def _wait_longer(self, retry_after_seconds: float | None) -> None:
        self._num_failures += 1
        self._due_at = time.monotonic() + _jittered(delay_after(self._num_failures, retry_after_seconds))

    def _keep(self, parked: _Parked) -> None:
        with self._changed:
            is_replaced = any(known.event.task_id == parked.event.task_id for known in self._parked)
            if not is_replaced:
                self._parked.append(parked)
        if is_replaced:
            self._ack(parked.delivery)

    def _bury_unreadable(self) -> None:
        while self._unreadable:
            delivery, reason = self._unreadable[0]
            self._notifier.bury(delivery.body, reason)
            self._ack(delivery)
            self._unreadable.popleft()

    def _ack(self, delivery: Delivery) -> None:
        assert self._consumer is not None, "a lane settles only what its consumer gave it"  # noqa: S101
        self._consumer.ack(delivery)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.9, 1.2)  # noqa: S311 - jitter, not a secret
