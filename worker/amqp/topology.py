"""The worker's queues and exchange: names, arguments, declarations."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pika.exceptions

from config.broker import BrokerSettings
from worker.amqp.connection import Connection
from worker.amqp.error_messages import NOT_FOUND, PRECONDITION_FAILED

NO_QUEUE = re.compile(r"^NOT_FOUND - no queue '")

# Delays before a retry of a job that did not cause its failure; after the last the job fails. One queue each.
RETRY_DELAYS_SECONDS = (30, 30, 300, 300)

# TTL of a leased job's copy, after which a worker checks it: at most a sixth of the broker's consumer timeout.
MAX_COPY_SECONDS, COPY_SHARE = 10.0, 1 / 6
# RabbitMQ 4 drops a message returned more than 20 times to a quorum queue that sets no limit. Never -1, which means
# "no limit" there: 3.10 then drops at the first return.
DELIVERY_LIMIT = 1_000_000
# A full queue nacks what is published, and the publisher keeps it; the default drops the oldest message.
_QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT, "x-overflow": "reject-publish"}


@dataclass(frozen=True, slots=True)
class QueueNames:
    """Names and arguments of the queues. The backend also declares `jobs`, durable without arguments: so must we.

    `others` are further queues of jobs (`RABBITMQ_QUEUES`). Each has retry queues of its own, since a message returns
    from one by a fixed routing key. All else is shared and named after `jobs`: copies there carry their jobs' queue in
    a header, so that workers with one of the queues or all of them may work side by side, and an operator has one
    place for dead letters, for parked ends and for cancel orders.
    """

    jobs: str
    consumer_timeout_seconds: float = 1800.0
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: BrokerSettings) -> Self:
        """Return the names that follow from the settings."""
        others = tuple(queue.name for queue in settings.consumed if queue.name != settings.queue)
        return cls(settings.queue, settings.consumer_timeout_seconds, others)

    @property
    def job_queues(self) -> tuple[str, ...]:
        """Every queue that publishers put jobs into."""
        return (self.jobs, *self.others)

    @property
    def recover(self) -> str:
        """Redelivered jobs: a quorum queue counts deliveries, which the classic queue of the jobs cannot."""
        return f"{self.jobs}.recover"

    @property
    def outbox(self) -> str:
        """Terminal events that the backend has not accepted yet."""
        return f"{self.jobs}.outbox"

    @property
    def dead(self) -> str:
        """Dead letters: messages that need an operator."""
        return f"{self.jobs}.dead"

    @property
    def lease(self) -> str:
        """Copies of jobs that outlive the broker's consumer timeout; each expires into `recover`."""
        return f"{self.jobs}.lease"

    @property
    def cancel_exchange(self) -> str:
        """Fanout exchange of cancel messages: every worker receives each of them."""
        return f"{self.jobs}.cancel"

    def retry(self, delay_seconds: int, jobs: str = "") -> str:
        """Return the name of the queue where a job waits `delay_seconds` before it returns to the queue `jobs`.

        A queue that these settings do not name has no consumer that is known of: its jobs return to `self.jobs`.
        """
        return f"{self.known(jobs)}.retry.{delay_seconds}"

    def known(self, jobs: str) -> str:
        """Return the queue of jobs by that name, or `self.jobs` where these settings name no such queue."""
        return jobs if jobs in self.others else self.jobs

    def role(self, name: str) -> str:
        """Return what a queue of `everything` is for: `jobs`, or what its name ends in, like `dead` and `retry.30`."""
        if name in self.job_queues:
            return "jobs"
        prefixes = [f"{jobs}." for jobs in self.job_queues if name.startswith(f"{jobs}.")]
        return name.removeprefix(max(prefixes, key=len, default=""))

    def family(self, jobs: str) -> tuple[str, ...]:
        """Return a queue of jobs and the queues that its jobs return from."""
        return (jobs, *dict.fromkeys(self.retry(delay, jobs) for delay in RETRY_DELAYS_SECONDS))

    @property
    def shared(self) -> tuple[str, ...]:
        """The worker's own queues for the jobs of all queues."""
        return (self.recover, self.outbox, self.dead, self.lease)

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Every queue with the arguments to declare it with where it is missing."""
        # Messages that a policy's limits (`delivery-limit`, `message-ttl`) would drop become dead letters instead.
        held = _QUORUM | self._dead_lettering(to=self.dead)
        own: dict[str, dict[str, Any]] = {self.recover: held, self.outbox: held, self.dead: _QUORUM}
        waits = {
            self.retry(delay, jobs): self._waiting(delay, then=jobs)
            for jobs in self.job_queues
            for delay in RETRY_DELAYS_SECONDS
        }
        copy_seconds = min(MAX_COPY_SECONDS, self.consumer_timeout_seconds * COPY_SHARE)
        leases = {self.lease: self._waiting(copy_seconds, then=self.recover)}
        return {jobs: {} for jobs in self.job_queues} | own | waits | leases

    @property
    def everything(self) -> tuple[str, ...]:
        """Names of all queues."""
        return tuple(self.arguments)

    def is_waiting(self, name: str) -> bool:
        """Return whether messages stay in the queue until their time to live is over."""
        return "x-message-ttl" in self.arguments.get(name, {})

    def _waiting(self, delay_seconds: float, *, then: str) -> dict[str, Any]:
        return _QUORUM | {"x-message-ttl": int(delay_seconds * 1000)} | self._dead_lettering(to=then)

    def _dead_lettering(self, *, to: str) -> dict[str, Any]:
        # At-least-once confirms the copy before the original goes; it demands reject-publish.
        return {
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": to,
            "x-dead-letter-strategy": "at-least-once",
        }


def ensure_queues(connection: Connection, names: QueueNames, queues: Iterable[str]) -> None:
    """Declare the missing ones of `queues` and leave the others as they are: only a passive declaration cannot fail on
    those. Raises pika's `ChannelClosedByBroker` at the first that cannot be used."""
    for name in queues:
        try:
            with connection.channel() as channel:
                channel.queue_declare(name, passive=True)
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code != NOT_FOUND:
                raise
            # Missing, or its node is down: then this is refused, too.
            declare_queue(connection, name, names.arguments[name])


def inspect_queues(connection: Connection, queues: Iterable[str]) -> dict[str, Any]:
    """Return the answer to a passive declaration by queue, with `message_count` and `consumer_count`.

    Left out are those that are missing or cannot be used.
    """
    found: dict[str, Any] = {}
    channel = connection.channel()
    for name in queues:
        try:
            found[name] = channel.queue_declare(name, passive=True).method
        except pika.exceptions.ChannelClosedByBroker:
            channel = connection.channel()
    channel.close()
    return found


def is_missing(error: Any) -> bool:
    """Return whether pika's `ChannelClosedByBroker` says that there is no such queue.

    RabbitMQ also answers 404 for one that exists and cannot be used: its node is down, or it has crashed.
    """
    return error.reply_code == NOT_FOUND and bool(NO_QUEUE.search(error.reply_text))


def declare_queue(connection: Connection, name: str, arguments: Mapping[str, Any]) -> None:
    """Declare the queue durable. One declared with other arguments in between stays as it is."""
    try:
        with connection.channel() as channel:
            channel.queue_declare(name, durable=True, arguments=dict(arguments))
    except pika.exceptions.ChannelClosedByBroker as error:
        # A worker of another version declared it first.
        if error.reply_code != PRECONDITION_FAILED:
            raise


def ensure_fanout(connection: Connection, exchange: str) -> None:
    """Declare the fanout exchange where it is missing."""
    try:
        with connection.channel() as channel:
            channel.exchange_declare(exchange, passive=True)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != NOT_FOUND:
            raise
        with connection.channel() as channel:
            channel.exchange_declare(exchange, exchange_type="fanout", durable=True)
