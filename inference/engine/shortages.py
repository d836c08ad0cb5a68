"""What becomes of a request that finds no memory to begin: it waits, and fails only where it is alone."""

import logging
from collections.abc import Callable, Sequence

import torch

from config.logs import log_event
from inference.engine.admission import Admission
from inference.engine.batcher import Batcher, Claim
from inference.lane import ActiveRequest, Lane

logger = logging.getLogger(__name__)

# Tries to find memory beside others, with half the batch each time. After these a request waits until no other is
# drawn, and nobody younger passes it: as long as others came, it would wait for ever.
TRIES_BESIDE_OTHERS = 4
# And then, before it fails. An adapter that was just being read for another request is gone by the second.
TRIES_ALONE = 3


class Shortages:
    """Decides, and makes room in the batch and in what admission keeps ahead. The loop's thread calls it."""

    def __init__(self, batcher: Batcher[Lane], admission: Admission, drawn: Callable[[], Sequence[Lane]]) -> None:
        """`drawn()`: the lanes that hold what it takes to draw."""
        self._batcher = batcher
        self._admission = admission
        self._drawn = drawn

    def is_to_be_alone(self, active: ActiveRequest) -> bool:
        """Has the request tried often enough beside others that are drawn?"""
        return active.num_shortages >= TRIES_BESIDE_OTHERS and self._is_beside_others(active)

    def answer(self, active: ActiveRequest, waiting: Sequence[ActiveRequest]) -> Claim:
        """The answer to a claim that ran out of memory, of one of those waiting; WITHDRAWN where it is to fail."""
        place = waiting.index(active)
        is_relieved = self._admission.relieve(waiting[:place], active, waiting[place + 1 :])
        if place or self._is_beside_others(active):
            self._note(active)
            return Claim.NOT_YET
        active.num_shortages_alone += 1
        may_try = is_relieved or active.num_shortages_alone < TRIES_ALONE
        return Claim.NO_SLOT if may_try else Claim.WITHDRAWN

    def postpone(self, active: ActiveRequest, error: Exception | None) -> bool:
        """Let those of the request's lanes that have just joined wait again, where `error` is a want of memory that
        others hold; False where it is anything else."""
        if not isinstance(error, torch.OutOfMemoryError) or not self._is_beside_others(active):
            return False
        self._note(active)
        for lane in self._batcher.active:
            if lane.owner is active and lane.sampler is None:
                self._batcher.remove(lane)
                self._batcher.add(lane)
        return True

    def _is_beside_others(self, active: ActiveRequest) -> bool:
        # Lanes of its own that have begun are others too: they hold memory, and end.
        return any(lane.owner is not active or lane.sampler is not None for lane in self._drawn())

    def _note(self, active: ActiveRequest) -> None:
        active.num_shortages += 1
        self._batcher.make_room()
        log_event(logger, "no memory for a request to begin", logging.WARNING, tries=active.num_shortages)
