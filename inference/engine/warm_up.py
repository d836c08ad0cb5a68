"""Warm-up requests before the first job: they measure a step and load the kernels of the first batches."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from inference.checkpoints import safety_checker as safety
from inference.errors import RequestCancelled, RequestFailed
from inference.lane import ActiveRequest
from inference.lora.adapter_key import AdapterKey, ReadAdapter
from inference.models.base import Family
from inference.request import AdapterFile, GenerationRequest, Source, Stage, StepReport

logger = logging.getLogger(__name__)

NUM_STEPS = 3
# Rows of the forwards on a GPU. Kernels are loaded, and cuBLAS and cuDNN make their plans, at the first forward with a
# number of rows, while its jobs wait: seconds in all.
ROWS = (2, 4, 8, 20)
GREY, WHITE = b"\x80", b"\xff"
# No such file: it is never read.
BLANK = AdapterFile(Path(), None, 1.0, version="warm-up")


class WarmUp:
    """Runs warm-up requests through the engine's own loop: cuDNN keeps its plans per thread."""

    def __init__(
        self, model: Family, enqueue: Callable[[ActiveRequest], None], forget: Callable[[AdapterKey], None]
    ) -> None:
        """`enqueue` adds a request to the loop; `forget`, for the loop's thread, evicts an adapter."""
        self._model = model
        self._enqueue = enqueue
        self._forget = forget

    def measure_step(self) -> float:
        """Draw one image and return the seconds of a step, without the slow first one. Raises `RequestFailed`."""
        seconds: list[float] = []

        def on_step(report: StepReport) -> None:
            seconds.append(report.seconds)

        active = self._request(1, on_step, lambda: False)
        self._enqueue(active)
        error = active.future.exception()
        # The content of an image without a prompt does not matter.
        if error is not None and not (isinstance(error, RequestFailed) and error.code == safety.CODE):
            raise error
        return min(seconds[2:])

    def load_kernels(self, max_lanes: int) -> None:
        """Take one step in batches of `ROWS` rows, without adapters and with one of zeros.

        The loop halves a batch that does not fit the memory, and caps later ones: the engine starts all the same.
        """
        blank = AdapterKey.of(BLANK)
        reading: Future[ReadAdapter] = Future()
        packed = self._model.pack(self._model.blank_adapter())
        reading.set_result(ReadAdapter(packed, Stage("adapt", time.monotonic(), 0.0)))
        for num_lanes in lane_counts(max_lanes, self._request(1).lanes[0].num_rows):
            self._take_one_step(self._unfinished(num_lanes))
            active = self._unfinished(num_lanes, BLANK)
            # Its adapter counts as read, and is evicted at the end.
            active.readings[blank] = reading
            active.future.add_done_callback(lambda _: self._forget(blank))
            self._take_one_step(active)

    def _take_one_step(self, active: ActiveRequest) -> None:
        self._enqueue(active)
        error = active.future.exception()
        if isinstance(error, RequestFailed) and error.code == "GPU_OOM":
            logger.warning("warm-up of %d lanes left out: %s", len(active.lanes), error)
        elif error is not None and not isinstance(error, RequestCancelled):
            raise error

    def _unfinished(self, num_lanes: int, *adapters: AdapterFile) -> ActiveRequest:
        """Return a request that is cancelled in the turn after its first step: nothing is decoded."""
        reports: list[StepReport] = []
        return self._request(num_lanes, reports.append, lambda: bool(reports), adapters)

    def _request(
        self,
        num_lanes: int,
        on_step: Callable[[StepReport], None] = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
        adapters: tuple[AdapterFile, ...] = (),
    ) -> ActiveRequest:
        size = self._model.base_size
        request = GenerationRequest(
            request_id="warm-up",
            prompt="",
            negative_prompt="",
            width=size,
            height=size,
            num_inference_steps=NUM_STEPS,
            # Jobs that name none: under guidance a lane has two rows.
            guidance_scale=self._model.default_guidance,
            seeds=tuple(range(num_lanes)),
            adapters=adapters,
            # What can only repaint is given a grey image to repaint.
            source=None if "text2image" in self._model.kinds else Source(GREY * 3 * size**2, 1.0, WHITE * size**2),
        )
        keys = tuple(AdapterKey.of(file) for file in adapters)
        return ActiveRequest(request, self._model.batch_traits(request), on_step, is_cancelled, keys)


def lane_counts(max_lanes: int, rows_per_lane: int) -> list[int]:
    """Return the numbers of lanes that make `ROWS`, at most `max_lanes`, fewest first."""
    return sorted({min(max_lanes, max(1, rows // rows_per_lane)) for rows in ROWS})
