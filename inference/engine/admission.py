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
from inference.lora.adapter import AdapterUnsupported
from inference.lora.adapter_key import AdapterKey
from inference.lora.bank import AppliedAdapter
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

    def prepare(self, drawing: ActiveRequest, *, num_ahead: int) -> None:
        """Begin to make a new request ready. On the caller's thread: the loop's may be a whole step away.

        Its adapters are not read yet where `num_ahead` others come first.
        """
        drawing.scheduling = self._preparer.submit(lambda: self._model.prepare(drawing.request))
        self._controls.prepare(drawing)
        if num_ahead < self._num_ahead:
            self._read_missing(drawing)

    def read_ahead(self, waiting: Sequence[ActiveRequest]) -> None:
        """Begin to read the adapters and ControlNets of those that come next, of all that wait."""
        self._controls.begin_round(waiting[: self._num_ahead])
        for drawing in waiting[: self._num_ahead]:
            self._read_missing(drawing)

    def claim(self, drawing: ActiveRequest) -> Claim:
        """Let the request begin if it can. Raises what preparing or loading it ended with; after a
        `torch.OutOfMemoryError` it holds nothing, and may ask again."""
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
        num_pages: dict[Hashable, int] = {key: self._num_pages(drawing, key) for key in drawing.keys}
        self._check_total(sum(num_pages.values()))
        if not self.slots.has_room(num_pages):
            return Claim.NO_SLOT
        self._hold(drawing)
        # Not before: one that found no memory may still be withdrawn. What this one holds goes when its end is noticed.
        return Claim.GRANTED if drawing.begin() else Claim.WITHDRAWN

    def relieve(self, older: Sequence[ActiveRequest], drawing: ActiveRequest, younger: Sequence[ActiveRequest]) -> bool:
        """Free what is kept for none that draws or is older, so that a waiting request finds memory for what it claims;
        was there any? What of the request itself found no memory is prepared anew.

        Nothing is read ahead for younger ones until some request has ended.
        """
        self._num_ahead = 1
        is_relieved = any(other.readings for other in younger)
        for other in younger:
            other.readings.clear()
        for key in [key for key, reading in drawing.readings.items() if ran_out_of_memory(reading)]:
            del drawing.readings[key]
        return self._controls.relieve(older, drawing) or is_relieved

    def why_short(self, drawing: ActiveRequest) -> str:
        """Says what of the request finds no memory, and what would be right."""
        # By their numbers: what the job called them is not known here.
        total, new = len(drawing.keys), self._new_keys(drawing)
        missing = [f"adapter {number} of {total}" for number, key in enumerate(drawing.keys, 1) if key in new]
        if drawing.request.control is not None:
            missing.append(f"the ControlNet {quoted(drawing.request.control.model)}")
        what = " and ".join(missing) or "what the request needs"
        settings = "ADAPTER_MEMORY_GB" + (" or CONTROLNET_MEMORY_GB" if drawing.request.control else "")
        remedy = f"lower {settings}, end what else runs there or use a larger GPU"
        return f"the GPU's memory does not hold {what} beside the model, even alone: {remedy}"

    def condition(self, drawings: Sequence[ActiveRequest]) -> None:
        """Encode the prompts of requests that begin, in one go."""
        started_at = time.monotonic()
        for drawing, conditioning in zip(drawings, self._conditioner.condition(drawings), strict=True):
            drawing.conditioning = conditioning
            drawing.note_stage("encode", started_at)

    def release(self, drawing: ActiveRequest) -> None:
        """The request ends: its adapters stay until their slots are needed."""
        self._let_go(drawing)
        self._num_ahead = READ_AHEAD

    def close(self) -> None:
        self._preparer.close()

    def _read_missing(self, drawing: ActiveRequest) -> None:
        for key, file in zip(drawing.keys, drawing.request.adapters, strict=True):
            if key not in drawing.readings and self.slots.find(key) is None:
                drawing.readings[key] = self._preparer.read(key, file)

    def _new_keys(self, drawing: ActiveRequest) -> list[AdapterKey]:
        return [key for key in dict.fromkeys(drawing.keys) if self.slots.find(key) is None]

    def _num_pages(self, drawing: ActiveRequest, key: AdapterKey) -> int:
        slot = self.slots.find(key)
        return len(slot.pages) if slot else drawing.readings[key].result().packed.num_pages

    def _check_total(self, num_pages: int) -> None:
        if num_pages > self.slots.num_pages:
            held = f"this worker holds {self.slots.num_pages * PAGE_RANK} at once (ADAPTER_MEMORY_GB)"
            reason = f"the adapters are of ranks {num_pages * PAGE_RANK} together; {held}: use fewer, or of lower ranks"
            raise RequestFailed(AdapterUnsupported.code, reason)

    def _hold(self, drawing: ActiveRequest) -> None:
        """Hold the request's adapters and its ControlNet on the device until it ends; none of them where one fails."""
        try:
            self._load(drawing)
            self._controls.attach(drawing)
        except Exception:
            self._let_go(drawing)
            raise

    def _let_go(self, drawing: ActiveRequest) -> None:
        for key in drawing.held:
            self.slots.release(key)
        drawing.held.clear()
        self._controls.release(drawing)

    def _load(self, drawing: ActiveRequest) -> None:
        """Bring the request's adapters into slots and hold them there."""
        new = self._new_keys(drawing)
        # Those that are there first, or making room for the others might evict them.
        for key in dict.fromkeys(drawing.keys):
            if key not in new:
                drawing.held[key] = self.slots.acquire(key)
        for key in new:
            self._load_one(drawing, key)
        files = zip(drawing.keys, drawing.request.adapters, strict=True)
        drawing.row = tuple(AppliedAdapter(drawing.held[key].pages, file.scale) for key, file in files)
        drawing.stages.append(_adapt_stage([drawing.readings[key].result().stage for key in new]))
        drawing.readings.clear()

    def _load_one(self, drawing: ActiveRequest, key: AdapterKey) -> None:
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
