"""What a request needs before its first step: adapters and ControlNets there, a scheduler known, prompts encoded."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from inference.bank import Applied
from inference.batcher import Claim
from inference.conditioner import Conditioner
from inference.controls.desk import ControlDesk
from inference.families.family import Family
from inference.lane import Drawing
from inference.layers import PAGE_RANK
from inference.preparing import AdapterKey, Preparer
from inference.request import Stage
from inference.slots import Slots

# Requests whose adapters are read before there is a lane for them. More would only fill the memory.
READ_AHEAD = 4


class Admission:
    """Owner of the slots and of the preparer. The loop's thread calls it."""

    def __init__(self, model: Family, *, num_slots: int, max_rank: int, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called, on another thread, when a request may join that could not before."""
        self._model = model
        self.slots = Slots(num_slots, num_slots * max_rank // PAGE_RANK)
        self._preparer = Preparer(read=model.read_adapter, pack=model.pack, max_rank=max_rank, on_ready=on_ready)
        self._controls = ControlDesk(model, prepare=self._preparer.submit, load=self._preparer.load)
        self._conditioner = Conditioner(model)

    def prepare(self, drawing: Drawing, *, num_ahead: int) -> None:
        """Begin to make a new request ready. On the caller's thread: the loop's may be a whole step away.

        Its adapters are not read yet where `num_ahead` others come first.
        """
        drawing.scheduling = self._preparer.submit(lambda: self._model.prepare(drawing.request))
        self._controls.prepare(drawing)
        if num_ahead < READ_AHEAD:
            self._read_missing(drawing)

    def read_ahead(self, waiting: Sequence[Drawing]) -> None:
        """Begin to read the adapters and ControlNets of those that come next, of all that wait."""
        self._controls.begin_round(waiting[:READ_AHEAD])
        for drawing in waiting[:READ_AHEAD]:
            self._read_missing(drawing)

    def claim(self, drawing: Drawing) -> Claim:
        """Let the request begin if it can. Raises what preparing or loading it ended with."""
        # Once more: what was in a slot when the request came may have been evicted meanwhile.
        self._read_missing(drawing)
        needed: list[Future[Any]] = [drawing.scheduling]
        needed += [drawing.readings[key] for key in self._new_keys(drawing)]
        of_control = self._controls.needs(drawing)
        if of_control is None:
            return Claim.NO_SLOT
        needed += of_control
        if not all(one.done() for one in needed):
            return Claim.NOT_YET
        for one in needed:
            one.result()
        if not self.slots.has_room({key: self._num_pages(drawing, key) for key in drawing.keys}):
            return Claim.NO_SLOT
        if not drawing.begin():
            return Claim.WITHDRAWN
        self._load(drawing)
        self._controls.attach(drawing)
        return Claim.GRANTED

    def condition(self, drawings: Sequence[Drawing]) -> None:
        """Encode the prompts of requests that begin, in one go."""
        started_at = time.monotonic()
        for drawing, conditioning in zip(drawings, self._conditioner.condition(drawings), strict=True):
            drawing.conditioning = conditioning
            drawing.note_stage("encode", started_at)

    def release(self, drawing: Drawing) -> None:
        """The request ends: its adapters stay until their slots are needed."""
        for key in drawing.held:
            self.slots.release(key)
        self._controls.release(drawing)

    def close(self) -> None:
        self._preparer.close()

    def _read_missing(self, drawing: Drawing) -> None:
        for key, file in zip(drawing.keys, drawing.request.adapters, strict=True):
            if key not in drawing.readings and self.slots.find(key) is None:
                drawing.readings[key] = self._preparer.read(key, file)

    def _new_keys(self, drawing: Drawing) -> list[AdapterKey]:
        return [key for key in dict.fromkeys(drawing.keys) if self.slots.find(key) is None]

    def _num_pages(self, drawing: Drawing, key: AdapterKey) -> int:
        slot = self.slots.find(key)
        return len(slot.pages) if slot else drawing.readings[key].result().packed.num_pages

    def _load(self, drawing: Drawing) -> None:
        """Bring the request's adapters into slots and hold them there until it ends."""
        new = self._new_keys(drawing)
        # Those that are there first, or making room for the others might evict them.
        for key in dict.fromkeys(drawing.keys):
            if key not in new:
                drawing.held[key] = self.slots.acquire(key)
        for key in new:
            self._load_one(drawing, key)
        files = zip(drawing.keys, drawing.request.adapters, strict=True)
        drawing.row = tuple(Applied(drawing.held[key].pages, file.scale) for key, file in files)
        drawing.stages.append(_adapt_stage([drawing.readings[key].result().stage for key in new]))
        drawing.readings.clear()

    def _load_one(self, drawing: Drawing, key: AdapterKey) -> None:
        packed = drawing.readings[key].result().packed
        slot = self.slots.load(key, packed.num_pages)
        try:
            self._model.bank.write(slot.pages, packed)
        except Exception:
            # Nobody may take what is in these pages now for the adapter.
            self.slots.unload(key)
            raise
        drawing.held[key] = self.slots.acquire(key)


def _adapt_stage(read: list[Stage]) -> Stage:
    """From the first adapter's reading to the end of the last one's; nothing where all were in their slots."""
    if not read:
        return Stage("adapt", time.monotonic(), 0.0)
    started_at = min(stage.started_at for stage in read)
    return Stage("adapt", started_at, max(stage.started_at + stage.seconds for stage in read) - started_at)
