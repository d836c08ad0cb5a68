"""Telling the backend how a job ended: at once where it listens, by way of the outbox where it does not."""

import logging
import math
import random
import threading
import time
from dataclasses import replace
from typing import cast

import tenacity

from clients.webhooks import Attempt, Verdict, WebhookClient, WebhookKind
from config.logs import log_event
from worker.amqp.publisher import Publisher
from worker.amqp.topology import QueueNames
from worker.breakers import Breaker
from worker.metrics import Metrics
from worker.results.ledger import Ledger
from worker.results.refusals import ADDRESS_STATUSES, AddressBreaker
from worker.results.terminal_event import TerminalEvent

logger = logging.getLogger(__name__)

CALL_DEADLINE_SECONDS = 20.0
DELAYS_SECONDS = (1.0, 5.0, 15.0, 30.0)
# A job's thread and its place in the prefetch are worth more than patience: the outbox is just as durable.
PATIENCE_SECONDS = 10.0
MAX_AGE_SECONDS = 24 * 3600.0
# A backend may publish before its transaction commits: it does not know the generation yet, but will soon.
UNKNOWN_IS_TRANSIENT_SECONDS = 60.0
# An end this old may be another worker's by now; a younger one cannot, as the broker first has to miss heartbeats.
FRESH_SECONDS = 1.0
# What a wrong or expired token is answered with.
REFUSING_STATUSES = frozenset({401, 403})


def delay_after(num_attempts: int, retry_after_seconds: float | None) -> float:
    """Seconds to wait after the `num_attempts`-th attempt (1-based), before jitter. Pure."""
    planned = DELAYS_SECONDS[min(num_attempts, len(DELAYS_SECONDS)) - 1]
    return max(planned, retry_after_seconds or 0.0)


def is_hopeless(attempt: Attempt, age_seconds: float) -> bool:
    """Whether an event of that age should go to the dead letters after `attempt`. Pure."""
    if attempt.verdict is Verdict.REJECTED or age_seconds > MAX_AGE_SECONDS:
        return True
    return attempt.status == 404 and age_seconds > UNKNOWN_IS_TRANSIENT_SECONDS


_TOLD_ELSEWHERE = Attempt(Verdict.REJECTED, None, None, "told by another holder", False)


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
        breaker: Breaker,
        is_draining: threading.Event,
    ) -> None:
        """`breaker` hears whether the backend takes our token."""
        self._client = client
        self._breaker = breaker
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._metrics = metrics
        self._is_draining = is_draining
        # Kinds that were just parked: the next event of such a kind gets one try, not ten seconds of them.
        self._failing: set[WebhookKind] = set()
        self._taken_at = dict.fromkeys(WebhookKind, -math.inf)
        self.address_breaker = AddressBreaker()

    @property
    def failing(self) -> tuple[str, ...]:
        """The kinds of webhooks that the backend did not take of late."""
        return tuple(sorted(kind.value for kind in self._failing.copy()))

    def taken_at(self, kind: WebhookKind) -> float:
        """When the backend last took an event of the kind, by `time.monotonic()`."""
        return self._taken_at[kind]

    def tell(self, event: TerminalEvent) -> str:
        """Deliver `event`, or park it; say which. Raises `PublishFailed` where neither was possible."""
        if event.is_delivered:
            return "known"
        attempts: list[Attempt] = []
        last = self._try_patiently(event, attempts)
        if last.verdict is Verdict.DELIVERED:
            self._ledger.mark_delivered(event)
            return "delivered"
        if last is _TOLD_ELSEWHERE:
            return "known"
        if last.verdict is Verdict.REJECTED:
            self.bury(event.to_json(), f"the backend refused the {event.kind.value} webhook: {last.reason}")
            return "refused"

        self._failing.add(event.kind)
        now, wait = time.time(), jittered(delay_after(len(attempts), last.retry_after_seconds))
        self._publisher.publish(
            self._names.outbox,
            event.to_json(),
            attempt=len(attempts) + 1,
            reason=last.reason,
            since=now,
            due=now + wait,
        )
        log_event(logger, "webhook parked", logging.WARNING, kind=event.kind.value, reason=last.reason)
        return "parked"

    def park_unrecorded(self, event: TerminalEvent, reason: str) -> str:
        """Leave an end that the store does not record to the outbox, which records it before it sends it.

        Raises `PublishFailed`.
        """
        waiting = replace(event, is_recorded=False)
        self._publisher.publish(self._names.outbox, waiting.to_json(), attempt=1, reason=reason, since=time.time())
        log_event(logger, "end not recorded yet", logging.ERROR, kind=event.kind.value, reason=reason)
        return "parked"

    def attempt(self, event: TerminalEvent) -> Attempt:
        """One attempt at delivering `event`, counted."""
        attempt = self._client.send(event.webhook, deadline_seconds=CALL_DEADLINE_SECONDS)
        self._metrics.webhooks.labels(event.kind.value, attempt.verdict.name.lower()).inc()
        if attempt.status in REFUSING_STATUSES:
            self._breaker.refuse(attempt.reason, of=event.webhook.webhook_id)
        elif attempt.status is not None:
            self._breaker.accept()
        if attempt.is_ambiguous:
            self._metrics.webhooks_ambiguous.inc()
        if attempt.verdict is Verdict.DELIVERED:
            self._failing.discard(event.kind)
            self._taken_at[event.kind] = time.monotonic()
            self.address_breaker.accept()
        elif attempt.status in ADDRESS_STATUSES:
            return self._doubted(attempt, event)
        return attempt

    def is_hopeless(self, attempt: Attempt, age_seconds: float) -> bool:
        """Whether an event of that age should go to the dead letters after `attempt`."""
        if attempt.status == 404 and self.address_breaker.is_open:
            return age_seconds > MAX_AGE_SECONDS
        return is_hopeless(attempt, age_seconds)

    def _doubted(self, attempt: Attempt, event: TerminalEvent) -> Attempt:
        """`attempt`, in vain by its status, but not for good where the backend refuses every end."""
        self.address_breaker.refuse(event.webhook.webhook_id, cast(int, attempt.status))
        return replace(attempt, verdict=Verdict.RETRY) if self.address_breaker.is_open else attempt

    def bury(self, body: bytes, reason: str, *, attempt: int | None = None) -> None:
        """Leave a confirmed copy of an event or a job with the dead letters. Raises `PublishFailed`."""
        self._publisher.publish(self._names.dead, body, attempt=attempt, reason=reason)
        log_event(logger, "dead letter", logging.ERROR, reason=reason)

    def _try_patiently(self, event: TerminalEvent, attempts: list[Attempt]) -> Attempt:
        def once() -> Attempt:
            # While this one waited, or its process was frozen behind the record, another holder may have been quicker.
            is_told = (bool(attempts) or _is_stale(event)) and self._ledger.is_delivered(event)
            attempts.append(_TOLD_ELSEWHERE if is_told else self.attempt(event))
            return attempts[-1]

        patience = 0.0 if event.kind in self._failing else PATIENCE_SECONDS
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda attempt: attempt.verdict is Verdict.RETRY),
            wait=lambda state: jittered(delay_after(state.attempt_number, attempts[-1].retry_after_seconds)),
            stop=tenacity.stop_before_delay(patience) | tenacity.stop_when_event_set(self._is_draining),
            sleep=tenacity.sleep_using_event(self._is_draining),
            retry_error_callback=lambda _state: attempts[-1],
        )
        return tries(once)


def _is_stale(event: TerminalEvent) -> bool:
    """Whether the event was made long ago, or the clock was set since. One without a time counts as made just now."""
    return event.ended_at > 0 and not 0 <= time.time() - event.ended_at < FRESH_SECONDS


def jittered(seconds: float) -> float:
    """`seconds` and a little more: workers that lost the same backend must not come back in step, nor too early."""
    return seconds * random.uniform(1.0, 1.2)  # noqa: S311 - jitter, not a secret
