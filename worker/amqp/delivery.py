"""One message in hand, free of pika."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message under one delivery tag of one session. `since` is when it was parked and `due` when it is to be told
    next, in epoch seconds; `received_at` is `time.monotonic()`. `is_leased`: a copy kept for a job that may be at work
    somewhere. `reason` is why it was parked. `num_deliveries` counts earlier deliveries of this copy that were
    returned, by the broker; `num_crashes` the workers that were killed with copies before it, by our own header. Both
    are 0 but in our own queues."""

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

    @property
    def num_recoveries(self) -> int:
        """How many workers may have been killed with the message, as far as broker and header tell."""
        return self.num_crashes + self.num_deliveries


def whole_number(given: Any, *, default: int) -> int:
    """A header's whole number from 0 to 2^53, else `default`: headers can be forged, so nothing else is taken."""
    # pika reads 64-bit numbers, and the broker's delivery count is one, as a subclass of int.
    is_whole = isinstance(given, int) and not isinstance(given, bool)
    return int(given) if is_whole and 0 <= given < 2**53 else default
