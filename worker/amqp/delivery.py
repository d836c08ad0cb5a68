"""A delivery as a value, read from pika's arguments and our headers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from worker.amqp.topology import QueueNames
from worker.tracing.context import NO_TRACE, TraceContext

ATTEMPT_HEADER = "x-darkroom-attempt"
REASON_HEADER = "x-darkroom-reason"
SINCE_HEADER = "x-darkroom-since"
DUE_HEADER = "x-darkroom-due"
LEASE_HEADER = "x-darkroom-lease"
CRASHES_HEADER = "x-darkroom-crashes"
QUEUE_HEADER = "x-darkroom-queue"
PRIORITY_HEADER = "x-darkroom-priority"
COUNT_HEADER = "x-delivery-count"
MAX_REASON_CHARS = 500
MAX_QUEUE_CHARS = 100
MAX_PRIORITY = 255  # an octet


class Origin(NamedTuple):
    """The queue that a job was published to, empty where it is not known, its priority, and its trace context.

    Every copy of the message carries them. In a queue where messages wait for their time to be over the priority is a
    header alone: RabbitMQ 4 expires only what it would deliver next, and an urgent message would hold up the others.
    """

    queue: str = ""
    priority: int | None = None
    trace: TraceContext = NO_TRACE


NO_ORIGIN = Origin()


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message under one delivery tag of one session.

    `since` is when it was parked and `due` when it is to be sent next, in epoch seconds; `reason` is why it was parked;
    `received_at` is when it came, by `time.monotonic()`: the broker's consumer timeout runs from then on. `is_leased`:
    the copy of a job that may still be running on some worker.
    `num_deliveries` is the broker's count of earlier deliveries of this copy that were returned, `num_crashes` our
    header's count of workers killed while they held earlier copies. Both are 0 outside our own queues.
    """

    body: bytes
    queue: str
    is_redelivered: bool
    attempt: int
    num_deliveries: int
    since: float
    session: int
    tag: int
    channel_number: int
    received_at: float = 0.0
    is_leased: bool = False
    due: float = 0.0
    reason: str = ""
    num_crashes: int = 0
    origin: Origin = NO_ORIGIN

    @property
    def num_recoveries(self) -> int:
        """Upper estimate, from the broker's count and our header, of the workers killed while they held the message."""
        return self.num_crashes + self.num_deliveries


def delivery_of(
    method: Any,
    properties: Any,
    body: bytes,
    *,
    queue: str,
    names: QueueNames,
    session: int,
    channel_number: int,
    received_at: float | None = None,
) -> Delivery:
    """Build the delivery from what pika passes to a consumer of `queue`, now unless it was `received_at` earlier."""
    headers, now = properties.headers, int(time.time())
    # In a queue of jobs our headers could only be a publisher's own. The broker's count is right there, where it is a
    # quorum queue, and of no use: what was returned moves to `recover`.
    is_published = queue in names.job_queues
    counts: Mapping[str, Any] = {} if is_published else headers
    came_by = queue if is_published else str(headers.get(QUEUE_HEADER, ""))[:MAX_QUEUE_CHARS]
    return Delivery(
        body=body,
        queue=queue,
        is_redelivered=method.redelivered,
        attempt=max(1, whole_number(headers.get(ATTEMPT_HEADER), default=1)),
        num_deliveries=whole_number(counts.get(COUNT_HEADER), default=0),
        since=float(min(whole_number(headers.get(SINCE_HEADER), default=now), now)),
        session=session,
        tag=method.delivery_tag,
        channel_number=channel_number,
        received_at=time.monotonic() if received_at is None else received_at,
        # In the jobs' queue the header could only be a publisher's own.
        is_leased=queue == names.recover and LEASE_HEADER in headers,
        due=float(whole_number(headers.get(DUE_HEADER), default=0)),
        reason=str(headers.get(REASON_HEADER, ""))[:MAX_REASON_CHARS],
        num_crashes=whole_number(counts.get(CRASHES_HEADER), default=0),
        origin=Origin(came_by, priority_of(properties), TraceContext.from_headers(headers)),
    )


def priority_of(properties: Any) -> int | None:
    """Return the priority that a message or the one that it is a copy of was published with."""
    if properties.priority is not None:
        return int(properties.priority)
    # Also in a queue of jobs, where a retried job has it: a publisher's own gives what the property would.
    carried = whole_number(properties.headers.get(PRIORITY_HEADER), default=MAX_PRIORITY + 1)
    return carried if carried <= MAX_PRIORITY else None


def whole_number(given: Any, *, default: int) -> int:
    """Return a header's integer if it is within 0 to 2^53, else `default`: headers can be forged."""
    # pika reads 64-bit numbers, and the broker's delivery count is one, as a subclass of int.
    is_whole = isinstance(given, int) and not isinstance(given, bool)
    return int(given) if is_whole and 0 <= given < 2**53 else default
