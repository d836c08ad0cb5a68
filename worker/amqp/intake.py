"""The intake of several queues by weight: which message is taken when, over AMQP.

A prefetch for each queue cannot do it. Prefetches of a share each would leave places empty while other queues have
jobs; prefetches as large as all places would have the worker hold jobs that wait behind others for many rounds, while
another worker is idle. A prefetch for several queues together (`global`) is per channel, knows no weights, is refused
by quorum queues and deprecated in RabbitMQ 4. So a message is taken only when there is a place for it, and of the
queue whose turn it is:

- from a queue that may hold messages by `basic.get`, which also tells that it is empty;
- from an empty one by a consumer with a prefetch of 1, which is cancelled once it has delivered. No queue is polled.

So the worker holds as many messages as there are places, and one more at most of each queue that was empty or has just
joined: one that comes just while the last place is taken waits for the next, which is free within the time of a job.
Priorities that the broker sorts by count up to the moment of the start.

Each queue has a channel of its own, since RabbitMQ closes the channel on which it refuses something.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from worker.amqp.connection import Channel
from worker.amqp.fair_share import FairShare


class Message(NamedTuple):
    """A message as pika passes it on: `method` is of a delivery or of the answer to a get.

    `received_at` is when it came, by `time.monotonic()`.
    """

    queue: str
    channel: Channel
    method: Any
    properties: Any
    body: bytes
    received_at: float


class Intake:
    """Takes the jobs of the queues that have joined. For the consuming thread alone.

    `start` gets each message that has a place; the place is free again when the message is settled.
    """

    def __init__(
        self, share: FairShare, places: int, start: Callable[[Message], None], *, is_stopped: bool = False
    ) -> None:
        self._share = share
        self._places = places
        self._start = start
        self._channels: dict[str, Channel] = {}
        self._started: set[tuple[int, int]] = set()  # numbers of channels and delivery tags
        self._consumers: dict[str, str] = {}  # tags of those that wait for the first message of an empty queue
        self._arrived: dict[str, Message] = {}
        self.is_stopped = is_stopped

    @property
    def queues(self) -> list[str]:
        """The queues that have joined."""
        return list(self._channels)

    def join(self, queue: str, channel: Channel) -> None:
        """Take from this queue too, on a channel for it alone. Raises pika's `ChannelClosedByBroker` where the broker
        refuses: only a message that is asked for tells whether it does."""
        channel.basic_qos(prefetch_count=1)  # for each consumer
        message = None if self.is_stopped else _get(queue, channel)
        self._channels[queue] = channel
        if message is not None:
            self._arrived[queue] = message

    def settled(self, channel_number: int, tag: int) -> None:
        """Free the place of a settled message; `fill` gives it to the next."""
        self._started.discard((channel_number, tag))

    def fill(self) -> None:
        """Start messages while places are free and any queue has some; where none has, wait for their first."""
        for queue in self._arrived.keys() & self._consumers.keys():
            # Its only message is not settled, so that nothing can arrive in between and be returned.
            self._channels[queue].basic_cancel(self._consumers.pop(queue))
        empty = set(self._consumers)
        while not self.is_stopped and len(self._started) < self._places:
            queue = next((name for name in self._share.order() if name in self._channels and name not in empty), "")
            if not queue:
                self._wait_for_first(empty)
                return
            message = self._arrived.pop(queue, None) or _get(queue, self._channels[queue])
            if message is None:
                empty.add(queue)
            else:
                self._share.charge(queue)
                self._begin(message)

    def stop(self) -> None:
        """Take no further messages. Those that wait for a place are started, to be given back like the others."""
        self.is_stopped = True
        for queue, tag in self._consumers.items():
            self._channels[queue].basic_cancel(tag)
        self._consumers.clear()
        for message in self._arrived.values():
            self._begin(message)
        self._arrived.clear()

    def resume(self) -> None:
        """Take messages again, from the next `fill` on."""
        self.is_stopped = False

    def _begin(self, message: Message) -> None:
        self._started.add((message.channel.channel_number, message.method.delivery_tag))
        self._start(message)

    def _wait_for_first(self, empty: set[str]) -> None:
        for queue in empty - self._consumers.keys():
            self._consumers[queue] = self._channels[queue].basic_consume(queue, self._on_message_of(queue))

    def _on_message_of(self, queue: str) -> Callable[..., None]:
        def keep(channel: Channel, method: Any, properties: Any, body: bytes) -> None:
            self._arrived[queue] = Message(queue, channel, method, properties, body, time.monotonic())

        return keep


def _get(queue: str, channel: Channel) -> Message | None:
    method, properties, body = channel.basic_get(queue)
    return None if method is None else Message(queue, channel, method, properties, body, time.monotonic())
