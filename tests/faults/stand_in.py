"""The engine's process without torch, for whole workers: up in a fraction of a second, and it waits on command.

A prompt's `hold@3` stops the engine when that request's step 3 begins, until the file `go-<task id>` appears beside the
journal, or `go-<task id>-3` where the prompt has several; the words of `tests.support.engine.fake_child` are obeyed as
well. Images are noise from the seed: of the requested size, and as large a PNG as there can be.
"""

import random
import time
from typing import Any

from inference.process.child import main
from inference.request import GenerationResult, RawImage, Stage
from tests.support.engine.fake_child import ActiveRequest, FakeEngine

POLL_SECONDS = 0.01


class StandIn(FakeEngine):
    """As `FakeEngine`, but its pictures have the size that was asked for and its results the stages of a real one."""

    def _deeds(self) -> Any:
        return super()._deeds() | {"hold": self._hold}

    def _hold(self, active: ActiveRequest) -> None:
        self._note("held", active.request)
        names = (f"go-{active.request.request_id}", f"go-{active.request.request_id}-{active.step_index}")
        while not any(self._journal.with_name(name).exists() for name in names):
            time.sleep(POLL_SECONDS)

    def _end(self, active: ActiveRequest, error: Exception | None) -> None:
        if error is not None:
            super()._end(active, error)
            return
        self._active.remove(active)
        self._note("end", active.request)
        active.future.set_result(drawn(active))


def drawn(active: ActiveRequest) -> GenerationResult:
    request, now = active.request, time.monotonic()
    images = tuple(
        RawImage(request.width, request.height, random.Random(seed).randbytes(request.width * request.height * 3), seed)
        for seed in request.seeds
    )
    stages = tuple(Stage(name, now, 0.0) for name in ("adapt", "encode", "denoise", "decode"))
    return GenerationResult(images, "fake", request.num_inference_steps, request.guidance_scale, stages)


if __name__ == "__main__":
    main(load=StandIn)
