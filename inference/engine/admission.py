"""What a request needs before its first step: adapters and ControlNets there, a scheduler known, prompts encoded."""

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from config.redacting import quoted
from inference.engine.batcher import Claim
from inference.engine.conditioner import Conditioner
from inference.engine.controlnet_admission import ControlNetAdmission
from inference.engine.preparer import Preparer, ran_out_of_memory
from inference.errors import RequestFailed
from inference.lane import ActiveRequest
from inference.lora.adapter_key import AdapterKey
from inference.lora.bank import AppliedAdapter
from inference.lora.files import AdapterUnsupported
from inference.lora.layers import PAGE_RANK
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
        """Memory that adapters and ControlNets which have not been asked for yet may still take on the device."""
        return self._model.bank.num_bytes_to_come + self._controls.num_bytes_to_come

    def prepare(self, active: ActiveRequest, *, num_ahead: int) -> None:
        """Begin to make a new request ready. On the caller's thread: the loop's may be a whole step away.

        Its adapters are not read yet where `num_ahead` others come first.
        """
        active.scheduling = self._preparer.submit(lambda: self._model.prepare(active.request))
        self._controls.prepare(active)
        if num_ahead < self._num_ahead:
            self._read_missing(active)

    def read_ahead(self, waiting: Sequence[ActiveRequest]) -> None:
        """Begin to read the adapters and ControlNets of those that come next, of all that wait."""
        self._controls.begin_round(waiting[: self._num_ahead])
        for active in waiting[: self._num_ahead]:
            self._read_missing(active)

    def claim(self, active: ActiveRequest) -> Claim:
        """Let the request begin if it can. Raises what preparing or loading it ended with; after a
        `torch.OutOfMemoryError` it holds nothing, and may ask again."""
        # Once more: what was in a slot when the request came may have been evicted meanwhile.
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
        num_pages: dict[Hashable, int] = {key: self._num_pages(active, key) for key in active.keys}
        self._check_total(sum(num_pages.values()))
        if not self.slots.has_room(num_pages):
            return Claim.NO_SLOT
        self._hold(active)
        # Not before: one that found no memory may still be withdrawn. What this one holds goes when its end is noticed.
        return Claim.GRANTED if active.begin() else Claim.WITHDRAWN

    def relieve(self, older: Sequence[ActiveRequest], active: ActiveRequest, younger: Sequence[ActiveRequest]) -> bool:
        """Free what is kept for none that draws or is older, so that a waiting request finds memory for what it claims;
        was there any? What of the request itself found no memory is prepared anew.

        Nothing is read ahead for younger ones until some request has ended.
        """
        self._num_ahead = 1
        is_relieved = any(other.readings for other in younger)
        for other in younger:
            other.readings.clear()
        for key in [key for key, reading in active.readings.items() if ran_out_of_memory(reading)]:
            del active.readings[key]
        return self._controls.relieve(older, active) or is_relieved

    def why_short(self, active: ActiveRequest) -> str:
        """Says what of the request finds no memory, and what would be right."""
        # By their numbers: what the job called them is not known here.
        total, new = len(active.keys), self._new_keys(active)
        missing = [f"adapter {number} of {total}" for number, key in enumerate(active.keys, 1) if key in new]
        if active.request.control is not None:
            missing.append(f"the ControlNet {quoted(active.request.control.model)}")
        what = " and ".join(missing) or "what the request needs"
        settings = "ADAPTER_MEMORY_GB" + (" or CONTROLNET_MEMORY_GB" if active.request.control else "")
        remedy = f"lower {settings}, end what else runs there or use a larger GPU"
        return f"the GPU's memory does not hold {what} beside the model, even alone: {remedy}"

    def condition(self, requests: Sequence[ActiveRequest]) -> None:
        """Encode the prompts of requests that begin, in one go."""
        started_at = time.monotonic()
        for active, conditioning in zip(requests, self._conditioner.condition(requests), strict=True):
            active.conditioning = conditioning
            active.note_stage("encode", started_at)

    def release(self, active: ActiveRequest) -> None:
        """The request ends: its adapters stay until their slots are needed."""
        self._let_go(active)
        self._num_ahead = READ_AHEAD

    def close(self) -> None:
        self._preparer.close()

    def _read_missing(self, active: ActiveRequest) -> None:
        for key, file in zip(active.keys, active.request.adapters, strict=True):
            if key not in active.readings and self.slots.find(key) is None:
                active.readings[key] = self._preparer.read(key, file)

    def _new_keys(self, active: ActiveRequest) -> list[AdapterKey]:
        return [key for key in dict.fromkeys(active.keys) if self.slots.find(key) is None]

    def _num_pages(self, active: ActiveRequest, key: AdapterKey) -> int:
        slot = self.slots.find(key)
        return len(slot.pages) if slot else active.readings[key].result().packed.num_pages

    def _check_total(self, num_pages: int) -> None:
        if num_pages > self.slots.num_pages:
            held = f"this worker holds {self.slots.num_pages * PAGE_RANK} at once (ADAPTER_MEMORY_GB)"
            reason = f"the adapters are of ranks {num_pages * PAGE_RANK} together; {held}: use fewer, or of lower ranks"
            raise RequestFailed(AdapterUnsupported.code, reason)

    def _hold(self, active: ActiveRequest) -> None:
        """Hold the request's adapters and its ControlNet on the device until it ends; none of them where one fails."""
        try:
            self._load(active)
            self._controls.attach(active)
        except Exception:
            self._let_go(active)
            raise

    def _let_go(self, active: ActiveRequest) -> None:
        for key in active.held:
            self.slots.release(key)
        active.held.clear()
        self._controls.release(active)

    def _load(self, active: ActiveRequest) -> None:
        """Bring the request's adapters into slots and hold them there."""
        new = self._new_keys(active)
        # Those that are there first, or making room for the others might evict them.
        for key in dict.fromkeys(active.keys):
            if key not in new:
                active.held[key] = self.slots.acquire(key)
        for key in new:
            self._load_one(active, key)
        files = zip(active.keys, active.request.adapters, strict=True)
        active.row = tuple(AppliedAdapter(active.held[key].pages, file.scale) for key, file in files)
        active.stages.append(_adapt_stage([active.readings[key].result().stage for key in new]))
        active.readings.clear()

    def _load_one(self, active: ActiveRequest, key: AdapterKey) -> None:
        packed = active.readings[key].result().packed
        slot = self.slots.load(key, packed.num_pages)
        try:
            self._model.bank.write(slot.pages, packed)
        except Exception:
            # Nobody may take what is in these pages now for the adapter.
            self.slots.unload(key)
            raise
        active.held[key] = self.slots.acquire(key)


def _adapt_stage(read: list[Stage]) -> Stage:
    """From the first adapter's reading to the end of the last one's; nothing where all were in their slots."""
    if not read:
        return Stage("adapt", time.monotonic(), 0.0)
    started_at = min(stage.started_at for stage in read)
    return Stage("adapt", started_at, max(stage.started_at + stage.seconds for stage in read) - started_at)
