"""Health of the engine's process: hung, sick, or crashed too often. Pure but for the clock."""

import time
from collections.abc import Callable, Iterable, Mapping

from inference.request import GenerationRequest, ModelFacts

# Crashes in a row, no request finished between: a sick device or a broken install. Fail the process, not the queue.
# Generous: two poison requests, one found after the other, take six.
MAX_CONSECUTIVE_CRASHES = 8
# Requests in a row that ended with an unforeseen error: the cause may be the process.
MAX_CONSECUTIVE_FAULTS = 3
# Silence after which the engine counts as hung: at least this, and at least what its requests could take.
MIN_HANG_SECONDS = 60.0
MAX_STEP_FACTOR = 20.0
# No step is reported while every request waits for a ControlNet to load: SDXL's 2.5 GB, from a slow network's disk; nor
# while a model comes to the device, whose weights host memory may not have held any more.
MAX_LOADING_SECONDS = 240.0


class ChildHealth:
    """Silence, faults and crashes of one child after another. Not thread-safe."""

    def __init__(self, min_hang_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._min_hang_seconds = min_hang_seconds
        self._clock = clock
        self._last_sign_at = clock()
        self._faulted: set[str] = set()
        self.crashes_in_a_row = 0

    @property
    def silent_seconds(self) -> float:
        return self._clock() - self._last_sign_at

    @property
    def is_sick(self) -> bool:
        return len(self._faulted) >= MAX_CONSECUTIVE_FAULTS

    @property
    def is_hopeless(self) -> bool:
        return self.crashes_in_a_row >= MAX_CONSECUTIVE_CRASHES

    def is_hung(self, inside: Iterable[GenerationRequest], facts: Mapping[str, ModelFacts]) -> bool:
        """Return whether the child is silent for longer than a step of all requests, and their loading, could take.

        `facts` of the models by name.
        """
        silent_seconds = self.silent_seconds
        if silent_seconds <= self._min_hang_seconds:
            return False  # without adding up what its requests could take: this is asked after every message
        requests = list(inside)
        loads = len(facts) > 1 or any(one.control for one in requests)
        loading_seconds = MAX_LOADING_SECONDS if loads else 0.0
        longest_seconds = max(self._min_hang_seconds, longest_step_seconds(requests, facts))
        return silent_seconds > longest_seconds + loading_seconds

    def note_sign(self) -> None:
        """Restart the measure of silence: the child sent a message, or is idle."""
        self._last_sign_at = self._clock()

    def note_finished(self) -> None:
        self.crashes_in_a_row = 0
        self._faulted.clear()

    def note_fault(self, request_id: str) -> None:
        self._faulted.add(request_id)

    def note_crash(self) -> None:
        self.crashes_in_a_row += 1
        self._faulted.clear()


def longest_step_seconds(requests: Iterable[GenerationRequest], facts: Mapping[str, ModelFacts]) -> float:
    """Return an upper bound for a step of each request in turn, from the steps measured at base size."""
    longest = 0.0
    for one in requests:
        model = facts[one.model]
        area = max(1.0, one.width * one.height / model.base_size**2)
        longest += MAX_STEP_FACTOR * model.step_seconds * len(one.seeds) * area
    return longest
