"""One message in hand, free of pika."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message under one delivery tag of one session. `since` is when it was parked, in epoch seconds."""

    body: bytes
    queue: str
    is_redelivered: bool
    attempt: int
    num_deliveries: int
    since: float
    session: int
    tag: int
    channel_number: int
