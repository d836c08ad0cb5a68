"""Decide when a model on the device makes way for another. Pure: no torch, no clock, no thread."""

from typing import NamedTuple

# After this wait of a request for its model, the model on the device begins no others.
MAX_WAIT_SECONDS = 60.0
# A model with requests stays for so many times the seconds of a switch, which so take a fifth of the time at most.
MIN_STAY = 4.0
# Part of a batch: a model that has more of its own does not make way for a full batch of another.
FEW = 0.25


class Standing(NamedTuple):
    """A model's requests, and since when it is on the device.

    `num_waiting` requests have not begun, the oldest of them arrived at `oldest_at`; `num_running` have. `has_begun`:
    one of them has since `entered_at`.
    """

    num_waiting: int
    oldest_at: float
    num_running: int
    entered_at: float
    has_begun: bool


def is_due(coming: Standing, leaving: Standing, *, now: float, switch_seconds: float, full_batch: int) -> bool:
    """Return whether `leaving` is to begin no more requests, so that `coming` gets its place.

    A model without requests makes way at once. One that has some stays until it has begun one and its stay has paid for
    the switch, and then until those of the other have waited for `MAX_WAIT_SECONDS`, or fill a batch while it has few.
    """
    if not coming.num_waiting:
        return False
    if not leaving.num_waiting and not leaving.num_running:
        return True
    if not leaving.has_begun or now - leaving.entered_at < MIN_STAY * switch_seconds:
        return False
    has_few = leaving.num_waiting + leaving.num_running <= FEW * full_batch
    return now - coming.oldest_at >= MAX_WAIT_SECONDS or (has_few and coming.num_waiting >= full_batch)
