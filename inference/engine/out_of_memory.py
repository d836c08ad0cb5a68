"""Decide what a request does that finds no memory to begin: it waits, and fails only when no other request runs."""

import logging
from collections.abc import Callable, Sequence

import torch

from config.logs import log_event
from inference.engine.admission import Admission
from inference.engine.batcher import Batcher, Claim
from inference.lane import ActiveRequest, Lane

logger = logging.getLogger(__name__)

# Tries to find memory beside other requests, with half the batch each time. After these a request waits until no other
# runs, and no younger one passes it: as long as others came, it would wait for ever.
TRIES_BESIDE_OTHERS = 4
# Tries after that, before it fails. An adapter that was just being read for another request is gone by the second.
TRIES_ALONE = 3


class OutOfMemoryPolicy:
    """Decides, and makes room in the batch and in what admission holds ahead. The loop's thread calls it."""

    def __init__(
        self,
        batcher: Batcher[Lane],
        admission: Admission,
        *,
        running: Callable[[], Sequence[Lane]],
        drop_graphs: Callable[[], bool],
    ) -> None:
        """`running()`: the lanes that hold memory of the device, denoising or to be decoded. `drop_graphs()` frees that
        of captured forwards, and is False where there are none."""
        self._batcher = batcher
        self._admission = admission
        self._running = running
        self._drop_graphs = drop_graphs

    def must_run_alone(self, active: ActiveRequest) -> bool:
        """Return whether the request has to wait until no other runs: it has used up its tries beside others."""
        return active.num_ooms >= TRIES_BESIDE_OTHERS and self._is_beside_others(active)

    def after_failed_claim(self, active: ActiveRequest, waiting: Sequence[ActiveRequest]) -> Claim:
        """Return the answer to a claim, of one of `waiting`, that ran out of memory; WITHDRAWN where it must fail."""
        place = waiting.index(active)
        is_freed = self._admission.free_memory(waiting[:place], active, waiting[place + 1 :])
        is_freed |= self._drop_graphs()
        if place or self._is_beside_others(active):
            self._note(active)
            return Claim.NOT_YET
        active.num_ooms_alone += 1
        may_try = is_freed or active.num_ooms_alone < TRIES_ALONE
        return Claim.NO_SLOT if may_try else Claim.WITHDRAWN

    def postpone(self, active: ActiveRequest, error: Exception | None) -> bool:
        """Make the request's lanes that have just joined wait again, if `error` is a lack of memory that other requests
        hold; False after any other error."""
        if not isinstance(error, torch.OutOfMemoryError) or not self._is_beside_others(active):
            return False
        self._drop_graphs()
        self._note(active)
        for lane in self._batcher.active:
            if lane.owner is active and lane.sampler is None:
                self._batcher.remove(lane)
                self._batcher.add(lane)
        return True

    def _is_beside_others(self, active: ActiveRequest) -> bool:
        # Lanes of its own that have begun are others too: they hold memory, and end.
        return any(lane.owner is not active or lane.sampler is not None for lane in self._running())

    def _note(self, active: ActiveRequest) -> None:
        active.num_ooms += 1
        self._batcher.make_room()
        log_event(logger, "no memory for a request to begin", logging.WARNING, tries=active.num_ooms)
