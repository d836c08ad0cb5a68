"""Deliver a job's terminal event to the backend, or park it in the outbox."""

import logging
import math
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import cast

import tenacity

from clients.storage.errors import StorageError
from clients.webhooks import WebhookAttempt, WebhookClient, WebhookKind, WebhookResult
from config.logs import log_event
from worker.amqp.delivery import NO_ORIGIN, Origin
from worker.amqp.publisher import Publisher
from worker.amqp.topology import QueueNames
from worker.breakers import Breaker
from worker.metrics import Metrics
from worker.results.address_breaker import ADDRESS_STATUSES, AddressBreaker
from worker.results.ledger import Ledger
from worker.results.result_urls import ResultUrls
from worker.results.terminal_event import TerminalEvent

logger = logging.getLogger(__name__)

CALL_DEADLINE_SECONDS = 20.0
DELAYS_SECONDS = (1.0, 5.0, 15.0, 30.0)
# Short, since it holds a job's thread and its place in the prefetch: the outbox is just as durable.
PATIENCE_SECONDS = 10.0
MAX_AGE_SECONDS = 24 * 3600.0
# A backend may publish before its transaction commits, and answer 404 until then.
UNKNOWN_IS_TRANSIENT_SECONDS = 60.0
# An event this old may have been delivered by another worker: the broker needs missed heartbeats to redeliver a job.
FRESH_SECONDS = 1.0
# The answers to a wrong or expired token.
REFUSING_STATUSES = frozenset({401, 403})


def delay_after(num_attempts: int, retry_after_seconds: float | None) -> float:
    """Return the seconds to wait after the `num_attempts`-th attempt (1-based), before jitter. Pure."""
    planned = DELAYS_SECONDS[min(num_attempts, len(DELAYS_SECONDS)) - 1]
    return max(planned, retry_after_seconds or 0.0)


def is_permanent_failure(attempt: WebhookAttempt, age_seconds: float) -> bool:
    """Return whether an event of that age is to be dead-lettered after `attempt`. Pure."""
    if attempt.result is WebhookResult.REJECTED or age_seconds > MAX_AGE_SECONDS:
        return True
    return attempt.status == 404 and age_seconds > UNKNOWN_IS_TRANSIENT_SECONDS


class NotifyResult(StrEnum):
    """What became of a job's terminal event."""

    KNOWN = "known"  # another worker delivered it
    DELIVERED = "delivered"
    REFUSED = "refused"  # for good: it is a dead letter
    PARKED = "parked"  # in the outbox


_DELIVERED_ELSEWHERE = WebhookAttempt(WebhookResult.REJECTED, None, None, "told by another holder", False)


class Notifier:
    """Delivers events, or leaves a confirmed copy in the outbox or the dead letters. Thread-safe."""

    def __init__(
        self,
        *,
        client: WebhookClient,
        urls: ResultUrls,
        ledger: Ledger,
        publisher: Publisher,
        names: QueueNames,
        metrics: Metrics,
        breakers: Mapping[str, Breaker],
        is_draining: threading.Event,
    ) -> None:
        """Create a notifier that reports to `breakers`, by the address's setting, whether our token is accepted."""
        self._client = client
        self.urls = urls
        self._breakers = breakers
        self._ledger = ledger
        self._publisher = publisher
        self._names = names
        self._metrics = metrics
        self._is_draining = is_draining
        # Kinds that were just parked: the next event of such a kind gets one attempt, not ten seconds of them.
        self._failing: set[WebhookKind] = set()
        # When the backend last accepted an event of each kind, by `time.monotonic()`.
        self.accepted_at = dict.fromkeys(WebhookKind, -math.inf)
        self.address_breaker = AddressBreaker()

    @property
    def failing(self) -> tuple[str, ...]:
        """The kinds of webhooks whose last delivery failed."""
        return tuple(sorted(kind.value for kind in self._failing.copy()))

    def notify(self, event: TerminalEvent) -> NotifyResult:
        """Deliver `event`, park it, or dead-letter it. Raises `PublishFailed` where none was possible."""
        if event.is_delivered:
            return NotifyResult.KNOWN
        attempts: list[WebhookAttempt] = []
        last = self._send_with_retries(event, attempts)
        if last.result is WebhookResult.DELIVERED:
            self._ledger.mark_delivered(event)
            return NotifyResult.DELIVERED
        if last is _DELIVERED_ELSEWHERE:
            return NotifyResult.KNOWN
        if last.result is WebhookResult.REJECTED:
            self.dead_letter(event.to_json(), f"the backend refused the {event.kind.value} webhook: {last.reason}")
            return NotifyResult.REFUSED

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
        return NotifyResult.PARKED

    def park_unrecorded(self, event: TerminalEvent, reason: str) -> NotifyResult:
        """Park an event that the store did not record: the outbox records it before sending. Raises `PublishFailed`."""
        waiting = replace(event, is_recorded=False)
        self._publisher.publish(self._names.outbox, waiting.to_json(), attempt=1, reason=reason, since=time.time())
        log_event(logger, "end not recorded yet", logging.ERROR, kind=event.kind.value, reason=reason)
        return NotifyResult.PARKED

    def send_once(self, event: TerminalEvent) -> WebhookAttempt:
        """Send the webhook once; count the attempt and report it to the breakers.

        A status that rejects the event is a retry while its address rejects every event: the breaker is open at it.
        """
        attempt = self._send(event)
        self._metrics.webhooks.labels(event.kind.value, attempt.result.name.lower()).inc()
        if attempt.status in REFUSING_STATUSES:
            reason = f"{attempt.reason} at {attempt.setting}"
            self._breakers[attempt.setting].refuse(reason, of=event.webhook.webhook_id)
        elif attempt.status is not None:
            self._breakers[attempt.setting].accept()
        if attempt.is_ambiguous:
            self._metrics.webhooks_ambiguous.inc()
        if attempt.result is WebhookResult.DELIVERED:
            self._failing.discard(event.kind)
            self.accepted_at[event.kind] = time.monotonic()
            self.address_breaker.accept(attempt.setting)
        elif attempt.status in ADDRESS_STATUSES:
            self.address_breaker.refuse(event.webhook.webhook_id, cast(int, attempt.status), attempt.setting)
            if self.address_breaker.is_open(attempt.setting):
                return replace(attempt, result=WebhookResult.RETRY)
        return attempt

    def _send(self, event: TerminalEvent) -> WebhookAttempt:
        try:
            webhook = self.urls.webhook_of(event)
        except StorageError as error:
            return WebhookAttempt(WebhookResult.RETRY, None, None, f"no address can be signed: {error}", False)
        return self._client.send(webhook, deadline_seconds=CALL_DEADLINE_SECONDS)

    def is_permanent_failure(self, attempt: WebhookAttempt, age_seconds: float) -> bool:
        """Return whether an event of that age is to be dead-lettered after `attempt`, given the address breaker."""
        if attempt.status == 404 and self.address_breaker.is_open(attempt.setting):
            return age_seconds > MAX_AGE_SECONDS
        return is_permanent_failure(attempt, age_seconds)

    def dead_letter(self, body: bytes, reason: str, *, attempt: int | None = None, origin: Origin = NO_ORIGIN) -> None:
        """Publish a confirmed copy of an event, or of a job with its origin, to `dead`. Raises `PublishFailed`."""
        self._publisher.publish(self._names.dead, body, attempt=attempt, reason=reason, origin=origin)
        log_event(logger, "dead letter", logging.ERROR, reason=reason)

    def _send_with_retries(self, event: TerminalEvent, attempts: list[WebhookAttempt]) -> WebhookAttempt:
        def once() -> WebhookAttempt:
            # During a wait, or while this process was frozen after recording, another worker may have delivered it.
            # The clock may have been set back since; an event without a time is a new one.
            is_old = event.ended_at > 0 and not 0 <= time.time() - event.ended_at < FRESH_SECONDS
            is_delivered = (bool(attempts) or is_old) and self._ledger.is_delivered(event)
            attempts.append(_DELIVERED_ELSEWHERE if is_delivered else self.send_once(event))
            return attempts[-1]

        patience = 0.0 if event.kind in self._failing else PATIENCE_SECONDS
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda attempt: attempt.result is WebhookResult.RETRY),
            wait=lambda state: jittered(delay_after(state.attempt_number, attempts[-1].retry_after_seconds)),
            stop=tenacity.stop_before_delay(patience) | tenacity.stop_when_event_set(self._is_draining),
            sleep=tenacity.sleep_using_event(self._is_draining),
            retry_error_callback=lambda _state: attempts[-1],
        )
        return tries(once)


def jittered(seconds: float) -> float:
    """Return `seconds` plus up to 20 %: workers that lost the same backend must not retry in step, nor too early."""
    return seconds * random.uniform(1.0, 1.2)  # noqa: S311 - jitter, not a secret
