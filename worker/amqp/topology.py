"""The names of the worker's queues and what each is declared with."""

from dataclasses import dataclass
from typing import Any

# Waits before another try of a job that is not to blame; after the last the job fails. Each is a queue of its own.
RETRY_DELAYS_SECONDS = (30, 30, 300, 300)

# How long a leased job's copy lies before somebody looks at it: no longer than a sixth of the broker's timeout.
MAX_COPY_SECONDS, COPY_SHARE = 10.0, 1 / 6
# RabbitMQ 4 drops a message returned more than 20 times from a quorum queue without a limit of its own. Never -1, which
# it would take for "no limit": 3.10 then drops at the first return.
DELIVERY_LIMIT = 1_000_000
# A full queue refuses what is published, and the publisher keeps it; the default drops the oldest message.
_QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT, "x-overflow": "reject-publish"}


@dataclass(frozen=True, slots=True)
class QueueNames:
    """`jobs` belongs to the backend too, which declares it durable without arguments: so do we, or not at all."""

    jobs: str
    consumer_timeout_seconds: float = 1800.0

    @property
    def recover(self) -> str:
        """Redelivered jobs: a quorum queue counts deliveries, which the classic queue of the jobs cannot."""
        return f"{self.jobs}.recover"

    @property
    def outbox(self) -> str:
        """Terminal events the backend has not taken yet."""
        return f"{self.jobs}.outbox"

    @property
    def dead(self) -> str:
        """Dead letters: what needs a person."""
        return f"{self.jobs}.dead"

    @property
    def lease(self) -> str:
        """Copies of jobs that are longer at work than the broker waits; each comes by `recover` after a while."""
        return f"{self.jobs}.lease"

    @property
    def cancel_exchange(self) -> str:
        """Fanout exchange of the cancel orders: every worker hears each of them."""
        return f"{self.jobs}.cancel"

    def retry(self, delay_seconds: int) -> str:
        """Where a job waits `delay_seconds` before it returns to `jobs`."""
        return f"{self.jobs}.retry.{delay_seconds}"

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Every queue and the arguments to declare it with where it is missing."""
        # What a policy's limits would drop (`delivery-limit`, `message-ttl`) becomes a dead letter instead.
        held = _QUORUM | self._dead_lettering(to=self.dead)
        own: dict[str, dict[str, Any]] = {self.recover: held, self.outbox: held, self.dead: _QUORUM}
        waits = {self.retry(delay): self._waiting(delay, then=self.jobs) for delay in RETRY_DELAYS_SECONDS}
        copy_seconds = min(MAX_COPY_SECONDS, self.consumer_timeout_seconds * COPY_SHARE)
        leases = {self.lease: self._waiting(copy_seconds, then=self.recover)}
        return {self.jobs: {}} | own | waits | leases

    @property
    def everything(self) -> tuple[str, ...]:
        return tuple(self.arguments)

    def _waiting(self, delay_seconds: float, *, then: str) -> dict[str, Any]:
        return _QUORUM | {"x-message-ttl": int(delay_seconds * 1000)} | self._dead_lettering(to=then)

    def _dead_lettering(self, *, to: str) -> dict[str, Any]:
        # At-least-once confirms the copy before the original goes; it demands reject-publish.
        return {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": to,
            "x-dead-letter-strategy": "at-least-once",
        }
