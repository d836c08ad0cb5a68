"""A lane of the outbox: the parked events of one kind of end, and the threads that tell them."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from clients.storage.errors import StorageError
from clients.webhooks import Attempt, Verdict, WebhookKind
from config.logs import bind, log_event
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.results.ledger import Ledger, RecordUnreadable
from worker.results.notifier import MAX_AGE_SECONDS, Notifier, jittered
from worker.results.pacing import MAX_CALLS, Pacing, Parked

logger = logging.getLogger(__name__)

# Well under the broker's consumer timeout (30 minutes by default), after which it would close the channel.
MAX_HELD_SECONDS = 600.0
SWEEP_SECONDS = 5.0
# Between two tries of having an end recorded.
STORE_PAUSE_SECONDS = 15.0


class Lane:
    """The parked events of one kind, the threads that deliver them, and one that sees to those not to be delivered."""

    def __init__(
        self,
        kind: WebhookKind,
        notifier: Notifier,
        ledger: Ledger,
        publisher: Publisher,
        names: QueueNames,
        *,
        is_full: Callable[[], bool],
    ) -> None:
        self._kind = kind
        self._notifier = notifier
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._is_full = is_full
        self._changed = threading.Condition()
        self._pacing = Pacing()
        self._parked: deque[Parked] = deque()
        self._in_turn: list[Parked] = []
        self._unreadable: deque[tuple[Delivery, str]] = deque()
        self._heard_at = time.monotonic()
        self._is_closing = False
        self._consumer: Consumer | None = None
        targets = [self._tidy, *[self._send] * MAX_CALLS]
        self._threads = [threading.Thread(target=one, name=f"outbox-{kind.value}", daemon=True) for one in targets]

    def start(self, consumer: Consumer) -> None:
        self._consumer = consumer
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()

    def join(self, deadline: float) -> None:
        """Wait for the threads until `deadline`, by `time.monotonic()`."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def add(self, parked: Parked) -> None:
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

    def in_hand(self) -> list[Parked]:
        with self._changed:
            return [*self._parked, *(parked for parked in self._in_turn if parked not in self._parked)]

    def refuse(self, delivery: Delivery, reason: str) -> None:
        with self._changed:
            self._unreadable.append((delivery, reason))
            self._changed.notify_all()

    def _tidy(self) -> None:
        """See to the events that no call is made for."""
        while not self._is_closing:
            # Each by itself: a queue of dead letters that is full takes none, and the outbox takes events.
            is_done = [self._is_done(work) for work in (self._return_stale, self._bury_expired, self._bury_unreadable)]
            self._wait_for(lambda: self._is_closing or (all(is_done) and bool(self._unreadable)))  # noqa: B023

    def _is_done(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except PublishFailed as error:
            _note_kept(error)
            return False
        return True

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(is_so, timeout=SWEEP_SECONDS)

    def _send(self) -> None:
        while not self._is_closing:
            self._try_next()

    def _try_next(self) -> None:
        parked = self._take()
        if parked is None:
            return
        with bind(task_id=parked.event.task_id, generation_id=parked.event.generation_id):
            try:
                self._try(parked)
            except PublishFailed as error:
                # Its own wait, not the lane's: the others need no copy where the backend takes them.
                _note_kept(error)
                self._keep(parked)
            finally:
                with self._changed:
                    self._in_turn.remove(parked)
                    self._changed.notify_all()

    def _take(self) -> Parked | None:
        """The next event if its turn comes within `SWEEP_SECONDS`."""
        with self._changed:
            self._hear_of_others()
            if not self._is_closing and self._next() is None:
                self._changed.wait(self._seconds_to_wait())  # once: what comes meanwhile may be due earlier
            first = None if self._is_closing else self._next()
            if first is not None:
                first.begun_at = time.monotonic()
                self._parked.remove(first)
                self._in_turn.append(first)
            return first

    def _next(self) -> Parked | None:
        return self._pacing.next_of(self._parked, self._in_turn, time.monotonic())

    def _seconds_to_wait(self) -> float:
        return self._pacing.seconds_to_wait(self._parked, self._in_turn, time.monotonic(), at_most=SWEEP_SECONDS)

    def _hear_of_others(self) -> None:
        """An end that a job's own thread delivered says as well that the backend takes events."""
        taken_at = self._notifier.taken_at(self._kind)
        if taken_at > self._heard_at:
            self._note_taken(taken_at)

    def _return_stale(self) -> None:
        """Put events held too long back at the tail of the outbox, so that others behind them get a turn."""
        stale = self._set_aside(lambda parked: time.monotonic() - parked.held_since > MAX_HELD_SECONDS)
        self._see_to(stale, self._put_back)

    def _bury_expired(self) -> None:
        """Leave what was tried here in vain and is over a day old with the dead letters, however rare its turns are."""
        expired = self._set_aside(lambda parked: parked.num_tries > 0 and parked.age_seconds > MAX_AGE_SECONDS)
        self._see_to(expired, self._bury_not_taken)

    def _set_aside(self, is_chosen: Callable[[Parked], bool]) -> list[Parked]:
        """Take events out of hand, so that no call begins for one that is being settled."""
        with self._changed:
            chosen = [parked for parked in self._parked if is_chosen(parked)]
            for parked in chosen:
                self._parked.remove(parked)
        return chosen

    def _see_to(self, chosen: list[Parked], settle: Callable[[Parked], None]) -> None:
        """Settle each; where the broker takes no copy, those that are left stay in hand. Raises `PublishFailed`."""
        left = deque(chosen)
        try:
            while left:
                settle(left[0])
                left.popleft()
        finally:
            for parked in left:
                self._keep(parked)

    def _put_back(self, parked: Parked) -> None:
        """Have the event come again behind all others. Raises `PublishFailed`."""
        delivery = parked.delivery
        if not self._holds(delivery):
            return  # of a lost session: the broker has the message itself again
        self._publisher.publish(
            self._names.outbox,
            delivery.body,
            attempt=parked.attempt,
            reason=parked.reason,
            since=delivery.since,
            due=time.time() + max(0.0, parked.due_at - time.monotonic()),
        )
        self._ack(delivery)

    def _try(self, parked: Parked) -> None:
        if not parked.event.is_recorded and not self._record(parked):
            return
        # After a lost connection another holder of this event may have been quicker.
        if self._ledger.is_delivered(parked.event):
            self._ack(parked.delivery)
            return
        attempt = self._notifier.attempt(parked.event)
        if attempt.verdict is Verdict.DELIVERED:
            with self._changed:
                self._note_taken(time.monotonic())
            self._ledger.mark_delivered(parked.event)
            log_event(logger, "webhook delivered late", kind=parked.event.kind.value, attempt=parked.attempt)
            self._ack(parked.delivery)
        elif self._notifier.is_hopeless(attempt, parked.age_seconds):
            parked.reason = attempt.reason
            self._bury_not_taken(parked)
        else:
            self._note_failure(parked, attempt)

    def _record(self, parked: Parked) -> bool:
        """Record an end that the store did not take before. False: it is not to be sent, or not yet."""
        try:
            recorded = self._ledger.record_late(parked.event)
        except RecordUnreadable as error:
            self._bury(parked, f"the end cannot be recorded: {error}")
            return False
        except StorageError as error:
            self._wait_for_store(parked, error)
            return False
        if recorded is None:
            log_event(logger, "end dropped", logging.WARNING, reason="the job has had another end since")
            self._ack(parked.delivery)
            return False
        parked.event = recorded
        return True

    def _wait_for_store(self, parked: Parked, error: StorageError) -> None:
        if parked.age_seconds > MAX_AGE_SECONDS:
            self._bury(parked, f"the end could not be recorded for a day: {error}")
            return
        log_event(logger, "end not recorded yet", logging.WARNING, reason=str(error))
        # Its own wait, not the lane's: the backend may be well.
        parked.due_at = time.monotonic() + jittered(STORE_PAUSE_SECONDS)
        self._keep_in_turn(parked)

    def _note_failure(self, parked: Parked, attempt: Attempt) -> None:
        now = time.monotonic()
        with self._changed:
            is_back = self._pacing.note_failed(parked, attempt, now, num_parked=len(self._parked) + 1)
            parked.fail(attempt, now)
            if is_back:
                self._let_through(is_taking=False)
        self._keep_in_turn(parked)

    def _keep_in_turn(self, parked: Parked) -> None:
        """Keep what failed, or where the broker gives no more, have those behind it come in. Raises `PublishFailed`."""
        if self._is_full():
            self._put_back(parked)
        else:
            self._keep(parked)

    def _note_taken(self, heard_at: float) -> None:
        self._heard_at = heard_at
        self._pacing.note_taken()
        self._let_through(is_taking=True)

    def _let_through(self, *, is_taking: bool) -> None:
        for parked in self._parked:
            parked.let_through(is_taking=is_taking)
        self._changed.notify_all()

    def _keep(self, parked: Parked) -> None:
        with self._changed:
            is_replaced = any(known.event.task_id == parked.event.task_id for known in self._parked)
            if not is_replaced:
                self._parked.append(parked)
        if is_replaced:
            self._ack(parked.delivery)

    def _bury_not_taken(self, parked: Parked) -> None:
        self._bury(parked, f"the {parked.event.kind.value} webhook was not taken: {parked.reason}")

    def _bury(self, parked: Parked, reason: str) -> None:
        """Leave a confirmed copy with the dead letters. Raises `PublishFailed`."""
        if not self._holds(parked.delivery):
            return  # of a lost session: the broker has the message itself again
        try:
            self._notifier.bury(parked.delivery.body, reason)
        except PublishFailed:
            parked.note_unburied(time.monotonic())
            raise
        self._ack(parked.delivery)

    def _bury_unreadable(self) -> None:
        while self._unreadable:
            delivery, reason = self._unreadable[0]
            self._notifier.bury(delivery.body, reason)
            self._ack(delivery)
            self._unreadable.popleft()

    def _holds(self, delivery: Delivery) -> bool:
        assert self._consumer is not None, "a lane settles only what its consumer gave it"  # noqa: S101
        return self._consumer.holds(delivery)

    def _ack(self, delivery: Delivery) -> None:
        assert self._consumer is not None, "a lane settles only what its consumer gave it"  # noqa: S101
        self._consumer.ack(delivery)


def _note_kept(error: PublishFailed) -> None:
    log_event(logger, "outbox keeps its events", logging.WARNING, reason=str(error))
