"""What a consumer takes: one queue, several by weight, or a fanout exchange."""

from collections.abc import Callable
from dataclasses import dataclass

from config.broker import QueueWeight
from worker.amqp.delivery import Delivery


@dataclass(frozen=True, slots=True)
class Subscription:
    """A queue to consume. `on_delivery` runs on the consuming thread: it must return at once and never raise.

    `is_work`: deliveries stop while the consumer is paused.
    """

    queue: str
    prefetch: int
    on_delivery: Callable[[Delivery], None]
    is_work: bool = True


@dataclass(frozen=True, slots=True)
class WeightedSubscription:
    """Queues of work to consume by weight, at most `places` messages unsettled at once. `on_delivery` as above."""

    queues: tuple[QueueWeight, ...]
    places: int
    on_delivery: Callable[[Delivery], None]


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A fanout `exchange` whose every message is passed to `on_message` while connected, on the consuming thread."""

    exchange: str
    on_message: Callable[[bytes], None]
