"""The engine's process without torch: the real child around an engine that obeys what it reads in the prompt.

Words of a prompt like `poison@3` act when that request's step 3 begins; `refuse` makes `generate` raise.
`MODEL_ID` is the path of a journal of the engine's calls and events, or of a folder for it: lines of process id, event
and request id.
"""

import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from config.model import ModelSettings
from inference.errors import EngineFault, EngineStartFailed, RequestCancelled, RequestFailed
from inference.process.child import main
from inference.request import (
    EngineLoad,
    GenerationRequest,
    GenerationResult,
    IsCancelled,
    ModelFacts,
    OnLoadReport,
    OnStep,
    Preview,
    RawImage,
    StepReport,
)

BASE_SIZE = 128
PREVIEW_SIZE = BASE_SIZE // 8
STEP_SECONDS = 0.01
TURN_SECONDS = 0.005
PAUSE_SECONDS = 1.5
NUM_SLOTS = 7
EXIT_POISONED = 13


@dataclass(eq=False)
class ActiveRequest:
    """A request the engine has: waiting, then with all its lanes in every turn."""

    request: GenerationRequest
    on_step: OnStep
    is_cancelled: IsCancelled
    future: Future[GenerationResult] = field(default_factory=Future)
    step_index: int = 0
    preview_every: int = 0

    def has_verb(self, verb: str) -> bool:
        return f"{verb}@{self.step_index}" in self.request.prompt.split()

    def report(self) -> None:
        is_due = self.preview_every and self.step_index and self.step_index % self.preview_every == 0
        preview = Preview(PREVIEW_SIZE, PREVIEW_SIZE, bytes(3 * PREVIEW_SIZE**2)) if is_due else None
        self.on_step(StepReport(self.step_index, self.request.num_inference_steps, TURN_SECONDS, preview))


class FakeEngine:
    """As `LocalEngine` to the process around it, one lane a request."""

    def __init__(self, settings: ModelSettings, on_load_report: OnLoadReport) -> None:
        self._journal = Path(settings.model_id)
        if self._journal.is_dir():
            self._journal /= "journal"
        if not self._journal.parent.is_dir():
            raise EngineStartFailed(f"no folder for {self._journal}")
        self._num_lanes = settings.max_concurrent_generations
        self._preview_every = settings.preview_every
        self._on_load_report = on_load_report
        self._changed = threading.Condition()
        self._waiting: list[ActiveRequest] = []
        self._active: list[ActiveRequest] = []
        self.is_broken = False
        facts = ModelFacts(
            model="fake",
            family="fake",
            base_size=BASE_SIZE,
            size_multiple=8,
            default_steps=1,
            default_guidance=0.0,
            schedulers=("fake",),
            device="cpu",
            dtype="float32",
            load_seconds=0.0,
            step_seconds=STEP_SECONDS,
        )
        self.facts_by_model = dict.fromkeys(settings.model_names, facts)
        self._note("start")
        on_load_report(EngineLoad(1, 1, 0, 0, 0))  # a warm-up: the child must not report it
        threading.Thread(target=self._run, daemon=True).start()

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]:
        self._note("generate", request)
        if "refuse" in request.prompt.split():
            raise FileNotFoundError("no adapter there")
        active = ActiveRequest(request, on_step, is_cancelled, preview_every=self._preview_every)
        with self._changed:
            self._waiting.append(active)
            self._changed.notify()
        return active.future

    def close(self) -> None:
        self._note("close")

    def _note(self, event: str, request: GenerationRequest | None = None) -> None:
        with self._journal.open("a") as journal:
            journal.write(f"{os.getpid()} {event} {request.request_id if request else '-'}\n")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._active)
            time.sleep(TURN_SECONDS)
            self._turn()

    def _turn(self) -> None:
        self._admit()
        batch = list(self._active)
        for active in batch:
            self._step(active)
        num_lanes = len(self._active)
        self._on_load_report(EngineLoad(len(batch), num_lanes, num_lanes, 1, NUM_SLOTS - 1 - num_lanes))

    def _admit(self) -> None:
        with self._changed:
            self._waiting.sort(key=lambda one: one.request.arrived_at)
            while self._waiting and len(self._active) < self._num_lanes:
                active = self._waiting.pop(0)
                if active.future.set_running_or_notify_cancel():
                    self._note("begin", active.request)
                    self._active.append(active)
                    active.report()

    def _step(self, active: ActiveRequest) -> None:
        if active not in self._active:
            return  # it went down with a broken device a moment ago
        active.step_index += 1
        if active.is_cancelled():
            self._end(active, RequestCancelled("cancelled"))
            return
        for verb, deed in self._deeds().items():
            if active.has_verb(verb):
                deed(active)
        if active not in self._active:
            return
        active.report()
        if active.step_index == active.request.num_inference_steps:
            self._end(active, None)

    def _deeds(self) -> dict[str, Callable[[ActiveRequest], None]]:
        return {
            "poison": lambda _: os._exit(EXIT_POISONED),
            "poison-in-company": lambda _: os._exit(EXIT_POISONED) if len(self._active) > 1 else None,
            "tear": lambda _: die_in_the_middle_of_a_message(),
            "hang": lambda _: time.sleep(600),
            "pause": lambda _: time.sleep(PAUSE_SECONDS),
            "fault": lambda active: self._end(active, ZeroDivisionError("a fault")),
            "fail": lambda active: self._end(active, RequestFailed("INVALID_INPUT", "not to be drawn")),
            "break": lambda _: self._break(),
        }

    def _break(self) -> None:
        self.is_broken = True
        for active in list(self._active):
            self._end(active, EngineFault("the device is broken"))

    def _end(self, active: ActiveRequest, error: Exception | None) -> None:
        request = active.request
        self._active.remove(active)
        self._note("end", request)
        if error is not None:
            active.future.set_exception(error)
            return
        images = tuple(RawImage(1, 1, seed.to_bytes(3, "big"), seed) for seed in request.seeds)
        active.future.set_result(GenerationResult(images, "fake", 1, 0.0, ()))


def die_in_the_middle_of_a_message() -> None:
    """Write the length of a message and less than that of it."""
    os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"x")
    os._exit(EXIT_POISONED)


if __name__ == "__main__":
    main(load=FakeEngine)
