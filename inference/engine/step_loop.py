"""The engine's loop: admit, denoise, advance, finish. Lanes of many requests, adapters and ages share each forward."""

import time
from collections.abc import Callable, Sequence

import torch

from inference.device.device import Device
from inference.engine.admission import Admission
from inference.engine.batch_runner import BatchRunner
from inference.engine.batcher import Batcher, Claim
from inference.engine.decoding import Decoder
from inference.engine.out_of_memory import OutOfMemoryPolicy
from inference.engine.previews import Previews
from inference.errors import EngineError, EngineFault, RequestCancelled, RequestFailed
from inference.lane import ActiveRequest, Lane, owners_of
from inference.lora.adapter_key import AdapterKey
from inference.models.base import Family
from inference.models.inputs import sampler_of
from inference.request import EngineLoad, GenerationResult


class StepLoop:
    """Owner of every request in the engine and of what the model holds for them. One thread calls it."""

    def __init__(
        self,
        model: Family,
        *,
        max_lanes: int,
        num_slots: int,
        max_rank: int,
        preview_every: int,
        on_ready: Callable[[], None],
    ) -> None:
        """`on_ready` is called, on another thread, when a request may join that could not before."""
        self._model = model
        self._device = Device(model.device, lambda: self._admission.num_bytes_to_come + self._model.num_bytes_of_graphs)
        self._batcher: Batcher[Lane] = Batcher(max_lanes, self._device.max_rows)
        self._admission = Admission(model, num_slots=num_slots, max_rank=max_rank, on_ready=on_ready)
        self._oom = OutOfMemoryPolicy(
            self._batcher,
            self._admission,
            running=lambda: [*self._batcher.active, *self._denoised],
            drop_graphs=model.drop_graphs,
        )
        self._runner = BatchRunner(model, self._device, self._batcher, self._fail)
        self._previews = Previews(model, self._device, preview_every)
        self._decoder = Decoder(model, self._device)
        self._requests: list[ActiveRequest] = []
        self._denoised: list[Lane] = []
        self._step_seconds = 0.0
        self._was_busy = False
        self._is_encoding = False
        self._may_begin = True
        self.num_begun_ever = 0

    @property
    def is_empty(self) -> bool:
        return not self._requests

    @property
    def has_work(self) -> bool:
        """False while every request here waits to be prepared: a step would do nothing."""
        # Where lanes have just left, those that waited for their places claim once more.
        is_decoding = bool(self._denoised) or self._decoder.is_busy
        return is_decoding or bool(self._batcher.active or (self._was_busy and self._batcher.waiting))

    def prepare(self, active: ActiveRequest) -> None:
        """Begin to make a request ready that will be added. Thread-safe."""
        num_waiting = len({id(lane.owner) for lane in self._batcher.waiting})
        self._admission.prepare(active, num_ahead=num_waiting)

    def add(self, active: ActiveRequest) -> None:
        """Add a request that was given to `prepare`."""
        self._requests.append(active)
        for lane in active.lanes:
            self._batcher.add(lane)

    @property
    def waiting(self) -> tuple[ActiveRequest, ...]:
        """The requests that have not begun."""
        return tuple(one for one in self._requests if not one.is_begun)

    @property
    def num_begun(self) -> int:
        """Number of requests that have begun and not ended."""
        return sum(one.is_begun for one in self._requests)

    def step(self, *, may_begin: bool = True) -> EngineLoad:
        """Take one turn: lanes join, one batch takes a step, denoised lanes become images.

        Without `may_begin` only requests that have begun go on.
        """
        self._may_begin = may_begin
        self._admit()
        self._was_busy = bool(self._batcher.active)
        started_at = time.monotonic()
        batch, predictions = self._runner.run(self._batcher.next_batch())
        self._advance(batch, predictions)
        if batch:
            self._step_seconds = time.monotonic() - started_at
        self._finish()
        return self.load(num_batched=len(batch))

    def load(self, *, num_batched: int = 0) -> EngineLoad:
        """Return the lanes and slots after a turn whose forward had `num_batched` lanes."""
        slots = self._admission.slots
        return EngineLoad(
            num_batched=num_batched,
            num_lanes=len(self._batcher.active),
            slots_active=slots.num_active,
            slots_idle=slots.num_idle,
            slots_free=slots.num_free,
        )

    def withdraw_waiting(self) -> None:
        """Cancel every request that has not begun."""
        for active in self._requests:
            active.future.cancel()

    def fail_all(self, error: EngineError) -> None:
        """End every request with `error`."""
        for active in tuple(self._requests):
            self._end(active, error)

    def forget(self, key: AdapterKey) -> None:
        """Evict an adapter that no request uses, if it is in a slot."""
        self._admission.slots.forget(key)

    def fail(self, active: ActiveRequest, error: EngineError) -> None:
        """End a request with `error`."""
        self._end(active, error)

    def evict_adapters(self) -> None:
        """Free the memory of adapters and captured forwards; no request runs."""
        self._model.drop_graphs()
        self._admission.evict_adapters()

    def drop_cancelled(self) -> None:
        """End the requests that were cancelled."""
        for active in tuple(self._requests):
            if active.future.cancelled() or active.is_cancelled():
                self._end(active, RequestCancelled("cancelled by the caller"))

    def close(self) -> None:
        self._admission.close()

    # Admit: cancelled requests leave, waiting ones join while there are lanes and slots.

    def _admit(self) -> None:
        self.drop_cancelled()
        self._admission.read_ahead(owners_of(self._batcher.waiting))
        self._is_encoding = False
        joined = self._batcher.admit(self._claim)
        self._condition([active for active in owners_of(joined) if active.conditioning is None])
        for lane in joined:
            # Some may have ended since, and others wait again.
            if lane in self._batcher.active:
                self._begin(lane)

    def _claim(self, lane: Lane) -> Claim:
        """Return whether the lane may join now. A request's first lane claims all that its other lanes need too."""
        active = lane.owner
        if active.is_ended:
            return Claim.WITHDRAWN
        if self._oom.must_run_alone(active):
            return Claim.NO_SLOT
        if active.is_begun:
            return Claim.GRANTED
        if not self._may_begin:
            return Claim.NOT_YET
        has_source = active.request.source is not None
        if has_source and self._is_encoding and any(one.sampler is not None for one in self._batcher.active):
            # Encoding an image takes as long as a step: the lanes that are being denoised wait for one at a time.
            return Claim.NOT_YET
        guarded = self._device.guard(lambda: self._admission.claim(active))
        if isinstance(guarded.error, torch.OutOfMemoryError):
            answer = self._oom.after_failed_claim(active, owners_of(self._batcher.waiting))
            if answer is Claim.WITHDRAWN:
                self._end(active, RequestFailed("GPU_OOM", self._admission.out_of_memory_message(active)))
            return answer
        if guarded.result is None:
            self._fail(active, guarded.error)
        self._is_encoding |= has_source and guarded.result is Claim.GRANTED
        return guarded.result or Claim.WITHDRAWN

    def _condition(self, requests: Sequence[ActiveRequest]) -> None:
        """Encode the prompts of all requests together; after an error those of each by itself."""
        if not requests:
            return
        error = self._device.guard(lambda: self._admission.condition(requests)).error
        if error is None:
            self.num_begun_ever += len(requests)
            for active in requests:
                active.report_begin(self._device.mark())
        elif len(requests) > 1:
            for active in requests:
                self._condition([active])
        elif not self._oom.postpone(requests[0], error):
            self._fail(requests[0], error)

    def _begin(self, lane: Lane) -> None:
        guarded = self._device.guard(lambda: self._model.begin(lane))
        if isinstance(guarded.error, torch.OutOfMemoryError):
            guarded = self._device.guard(lambda: self._model.begin(lane, in_tiles=True))
        if guarded.result is not None:
            lane.owner.scheduler, lane.sampler = guarded.result
        elif not self._oom.postpone(lane.owner, guarded.error):
            self._fail(lane.owner, guarded.error)

    # Advance: every lane of the batch takes its own scheduler's step.

    def _advance(self, batch: list[Lane], predictions: list[torch.Tensor]) -> None:
        for lane, prediction in zip(batch, predictions, strict=True):
            self._previews.project(lane, prediction)
            sampler_of(lane).advance(prediction)
        self._previews.deliver()
        launched = self._device.mark()
        for active in owners_of(batch):
            active.note_steps(launched)
        self._device.keep_pace(launched)
        for active in self._requests:
            active.report_steps()

    # Finish: denoised lanes leave the batch and are decoded, as many as a step's time allows.

    def _finish(self) -> None:
        leaving = [lane for lane in self._batcher.active if lane.is_denoised]
        for lane in leaving:
            self._batcher.remove(lane)
        self._denoised += leaving
        for active in owners_of(leaving):
            if active.is_denoised:
                active.note_stage("denoise", active.last_stage_ended_at)
        # Those that were launched in the turn before. This turn's forward is queued behind them: the device has work.
        self._end_decoded(num_left=0)
        # The rest are decoded for no longer than a step takes, and one image more.
        started_at = time.monotonic()
        while self._denoised and (not self._batcher.active or time.monotonic() - started_at < self._step_seconds):
            lane = self._denoised.pop(0)
            error = self._decoder.begin(lane)
            if error is not None:
                self._fail(lane.owner, error)
            # At most one in flight, or the clock would measure how long launching takes.
            self._end_decoded(num_left=1)

    def _end_decoded(self, *, num_left: int) -> None:
        """Collect the images that have arrived from the device, and wait for others until `num_left` are in flight."""
        while self._decoder.is_due(num_left=num_left):
            lane, guarded = self._decoder.end_oldest()
            active = lane.owner
            if guarded.result is None:
                self._fail(active, guarded.error)
                continue
            active.images[lane.number] = guarded.result
            if active.is_decoded:
                active.note_stage("decode", active.last_stage_ended_at)
                self._end(active, active.result())

    def _fail(self, active: ActiveRequest, error: Exception | None) -> None:
        """End the request with the `EngineError` for an error of the device or the model."""
        if isinstance(error, torch.OutOfMemoryError):
            size = f"a picture of {active.request.width}x{active.request.height}"
            reason = f"{size} does not fit the GPU's memory, even alone: ask for a smaller one"
            self._end(active, RequestFailed("GPU_OOM", reason))
        elif isinstance(error, EngineError):
            self._end(active, error)
        else:
            self._end(active, EngineFault(f"{type(error).__name__}: {error}"))

    def _end(self, active: ActiveRequest, outcome: GenerationResult | Exception) -> None:
        """Remove the request, free what it held, and resolve its future unless that was cancelled."""
        self._requests.remove(active)
        for lane in active.lanes:
            self._batcher.remove(lane)
            if lane in self._denoised:
                self._denoised.remove(lane)
        self._decoder.drop(active)
        self._admission.release(active)
        if not active.begin():
            return
        if isinstance(outcome, Exception):
            active.future.set_exception(outcome)
        else:
            # The device has ended the last step for certain: its pixels are here.
            active.report_steps()
            active.future.set_result(outcome)
