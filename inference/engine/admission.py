"""Admit requests to their first step: adapters and ControlNet on the device, scheduler known, prompts encoded."""

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

from config.redacting import quoted
from inference.engine.batcher import Claim
from inference.engine.conditioner import Conditioner
from inference.engine.controlnet_admission import ControlNetAdmission
from inference.engine.preparer import Preparer, ran_out_of_memory
from inference.errors import RequestFailed
from inference.lane import ActiveRequest
from inference.lora.adapter_key import AdapterKey
from inference.lora.errors import AdapterUnsupported
from inference.lora.layers import PAGE_RANK
from inference.lora.products.rows import AppliedAdapter
from inference.lora.slots import Slots
from inference.models.base import Family
from inference.request import Stage

# Requests whose adapters are read before there is a lane for them. More would only fill the memory.
READ_AHEAD = 4


class Admission:
    """Owner of the slots and of the preparer. The loop's thread calls it."""

    def __init__(self, model: Family, *, num_slots: int, max_rank: int, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called, on another thread, when a request may join that could not before."""
        self._model = model
        self.slots = Slots(num_slots, model.bank.num_pages)
        max_rank = min(max_rank, model.bank.num_pages * PAGE_RANK)
        self._preparer = Preparer(read=model.read_adapter, pack=model.pack, max_rank=max_rank, on_ready=on_ready)
        self._num_ahead = READ_AHEAD
        self._controls = ControlNetAdmission(model, prepare=self._preparer.submit, load=self._preparer.load)
        self._conditioner = Conditioner(model)

    @property
    def num_bytes_to_come(self) -> int:
        """Memory of the device that adapters and ControlNets which are not loaded yet may still take."""
        return self._model.bank.num_bytes_to_come + self._controls.num_bytes_to_come

    def prepare(self, active: ActiveRequest, *, num_ahead: int) -> None:
        """Begin to make a new request ready. Called on any thread: the loop's may be busy for a whole step.

        Its adapters are not read yet where too many others (`num_ahead`) come first.
        """
        active.scheduling = self._preparer.submit(lambda: self._model.prepare(active.request))
        self._controls.prepare(active)
        if num_ahead < self._num_ahead:
            self._read_missing(active)

    def read_ahead(self, waiting: Sequence[ActiveRequest]) -> None:
        """Begin to load the adapters and ControlNets of the next requests of `waiting`."""
        self._controls.begin_round(waiting[: self._num_ahead])
        for active in waiting[: self._num_ahead]:
            self._read_missing(active)

    def claim(self, active: ActiveRequest) -> Claim:
        """Let the request begin if everything it needs is ready. Raises the error of its preparing or loading; after a
        `torch.OutOfMemoryError` it holds nothing, and may claim again."""
        # Once more: an adapter that was in a slot when the request came may have been evicted since.
        self._read_missing(active)
        needed: list[Future[Any]] = [active.scheduling]
        needed += [active.readings[key] for key in self._new_keys(active)]
        of_control = self._controls.needs(active)
        if of_control is None:
            return Claim.NO_SLOT
        needed += of_control
        if not all(one.done() for one in needed):
            return Claim.NOT_YET
        for one in needed:
            one.result()
        if not self._has_room(active):
            return Claim.NO_SLOT
        with ExitStack() as undo:
            undo.callback(self._release, active)
            self._load(active)
            self._controls.attach(active)
            undo.pop_all()
        # Not before: one that found no memory may still be withdrawn. A withdrawn one is released when it is ended.
        return Claim.GRANTED if active.begin() else Claim.WITHDRAWN

    def free_memory(
        self, older: Sequence[ActiveRequest], active: ActiveRequest, younger: Sequence[ActiveRequest]
    ) -> bool:
        """Free memory that neither a running nor an older request uses, for a waiting request; False if there was none.

        What of the request itself found no memory is read again. Nothing is read ahead for younger ones until some
        request has ended.
        """
        self._num_ahead = 1
        is_freed = any(other.readings for other in younger)
        for other in younger:
            other.readings.clear()
        for key in [key for key, reading in active.readings.items() if ran_out_of_memory(reading)]:
            del active.readings[key]
        return self._controls.free_memory(older, active) or is_freed

    def out_of_memory_message(self, active: ActiveRequest) -> str:
        """Return which parts of the request find no memory, and the remedy."""
        # Adapters by their numbers: the job's names for them are not known here.
        total, new = len(active.keys), self._new_keys(active)
        missing = [f"adapter {number} of {total}" for number, key in enumerate(active.keys, 1) if key in new]
        if active.request.control is not None:
            missing.append(f"the ControlNet {quoted(active.request.control.model)}")
        what = " and ".join(missing) or "what the request needs"
        settings = "ADAPTER_MEMORY_GB" + (" or CONTROLNET_MEMORY_GB" if active.request.control else "")
        remedy = f"lower {settings}, end what else runs there or use a larger GPU"
        return f"the GPU's memory does not hold {what} beside the model, even alone: {remedy}"

    def condition(self, requests: Sequence[ActiveRequest]) -> None:
        """Encode the prompts of requests that begin, all together."""
        started_at = time.monotonic()
        for active, conditioning in zip(requests, self._conditioner.condition(requests), strict=True):
            active.conditioning = conditioning
            active.note_stage("encode", started_at)

    def release(self, active: ActiveRequest) -> None:
        """Release what an ended request holds: its adapters stay until their slots are needed."""
        self._release(active)
        self._num_ahead = READ_AHEAD

    def evict_adapters(self) -> None:
        """Free the memory of all adapters; no request uses any."""
        self.slots.clear()
        self._model.bank.free()

    def close(self) -> None:
        self._preparer.close()

    def _read_missing(self, active: ActiveRequest) -> None:
        for key, file in zip(active.keys, active.request.adapters, strict=True):
            if key not in active.readings and self.slots.find(key) is None:
                active.readings[key] = self._preparer.read(key, file)

    def _new_keys(self, active: ActiveRequest) -> list[AdapterKey]:
        return [key for key in dict.fromkeys(active.keys) if self.slots.find(key) is None]

    def _has_room(self, active: ActiveRequest) -> bool:
        """Return whether the request's adapters find slots and pages now; raise `RequestFailed` if they never do."""
        num_pages: dict[Hashable, int] = {}
        for key in active.keys:
            slot = self.slots.find(key)
            num_pages[key] = len(slot.pages) if slot else active.readings[key].result().packed.num_pages
        total = sum(num_pages.values())
        if total > self.slots.num_pages:
            held = f"this worker holds {self.slots.num_pages * PAGE_RANK} at once (ADAPTER_MEMORY_GB)"
            reason = f"the adapters are of ranks {total * PAGE_RANK} together; {held}: use fewer, or of lower ranks"
            raise RequestFailed(AdapterUnsupported.code, reason)
        return self.slots.has_room(num_pages)

    def _release(self, active: ActiveRequest) -> None:
        for key in active.held:
            self.slots.release(key)
        active.held.clear()
        self._controls.release(active)

    def _load(self, active: ActiveRequest) -> None:
        """Acquire slots for the request's adapters, loading those that are in none."""
        new = self._new_keys(active)
        # Those in slots first, or making room for the others might evict them.
        for key in dict.fromkeys(active.keys):
            if key not in new:
                active.held[key] = self.slots.acquire(key)
        for key in new:
            packed = active.readings[key].result().packed
            slot = self.slots.load(key, packed.num_pages)
            with ExitStack() as undo:
                # After an error these pages do not hold the adapter.
                undo.callback(self.slots.unload, key)
                self._model.bank.write(slot.pages, packed)
                undo.pop_all()
            active.held[key] = self.slots.acquire(key)
        files = zip(active.keys, active.request.adapters, strict=True)
        active.row = tuple(AppliedAdapter(active.held[key].pages, file.scale) for key, file in files)
        # From the first reading's start to the last one's end; empty where all adapters were in slots.
        read = [active.readings[key].result().stage for key in new]
        started_at = min((stage.started_at for stage in read), default=time.monotonic())
        ended_at = max((stage.started_at + stage.seconds for stage in read), default=started_at)
        active.stages.append(Stage("adapt", started_at, ended_at - started_at))
        active.readings.clear()
