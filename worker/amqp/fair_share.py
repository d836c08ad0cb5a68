"""Fair shares of several queues: which one's message is started next when a place is free. Pure."""

from collections.abc import Sequence
from fractions import Fraction

from config.broker import QueueWeight


class FairShare:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996) over queues, each message of cost 1. Not thread-safe.

    Each queue has a virtual time, at which its next message is due; starting one moves it on by 1 / weight. The queue
    that is due first is next, of several the one of the largest weight. So, among queues that have messages, the starts
    of each are its share of the weights, to within one message of each other queue. A queue of weight w has one of any
    W / w starts and one more for each other queue, W the sum of all weights: with 3 and 1, one of five. A queue that
    was empty is due now rather than when it would have been: it gets its share from its first message on, and nothing
    for the time in which it wanted none.
    """

    def __init__(self, queues: Sequence[QueueWeight]) -> None:
        self._weights = dict(queues)
        self._due = dict.fromkeys(self._weights, Fraction(0))
        self._now = Fraction(0)

    def order(self) -> list[str]:
        """Return the queues by name, the one whose message is to be started next first."""
        return sorted(self._weights, key=lambda name: (max(self._due[name], self._now), -self._weights[name]))

    def charge(self, name: str) -> None:
        """Account the start of a message of that queue."""
        self._now = max(self._due[name], self._now)
        self._due[name] = self._now + Fraction(1, self._weights[name])
