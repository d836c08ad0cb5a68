"""Warm-up requests before the first job: they compile, measure a step and load the kernels of the first batches."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from config.model import DEFAULT_MODEL
from inference.checkpoints import safety_checker as safety
from inference.errors import RequestCancelled, RequestFailed
from inference.lane import ActiveRequest
from inference.lora.adapter_key import AdapterKey, ReadAdapter
from inference.models.base import Family
from inference.request import AdapterFile, GenerationRequest, Source, Stage, StepReport

logger = logging.getLogger(__name__)

NUM_STEPS = 3
# Of requests that are cancelled after a step. The first of two is still there when the second has been prepared.
NUM_STEPS_CANCELLED = 50
# Rows of the forwards on a GPU. Kernels are loaded, and cuBLAS and cuDNN make their plans, at the first forward with a
# number of rows, while its jobs wait: seconds in all.
ROWS = (2, 4, 8, 20)
GREY, WHITE = b"\x80", b"\xff"
# Two chunks of a CLIP encoder, and within the limit of Z-Image's.
LONG_PROMPT = " ".join(["a"] * 100)
# Pixels by which a second size is taller. Every UNet halves it as often as it needs to.
EXTRA_HEIGHT = 64
# No such file: it is never read.
BLANK = AdapterFile(Path(), None, 1.0, version="warm-up")


class WarmUp:
    """Runs warm-up requests through the engine's own loop: cuDNN keeps its plans per thread."""

    def __init__(
        self,
        model: Family,
        enqueue: Callable[[ActiveRequest], None],
        forget: Callable[[AdapterKey], None],
        *,
        name: str = DEFAULT_MODEL,
    ) -> None:
        """`enqueue` adds a request to the loop; `forget`, for the loop's thread, evicts an adapter. `name` is what
        requests for the model have."""
        self._model = model
        self._name = name
        self._enqueue = enqueue
        self._forget = forget

    def measure_step(self) -> float:
        """Draw one image and return the seconds of a step, without the slow first one. Raises `RequestFailed`."""
        seconds: list[float] = []

        def on_step(report: StepReport) -> None:
            seconds.append(report.seconds)

        active = self._request(on_step)
        self._enqueue(active)
        error = active.future.exception()
        # The content of an image without a prompt does not matter.
        if error is not None and not (isinstance(error, RequestFailed) and error.code == safety.CODE):
            raise error
        return min(seconds[2:])

    def compile_blocks(self, max_lanes: int) -> None:
        """Take one step in every kind of batch that the denoiser's blocks have a graph for.

        One row and several, which torch tells apart; prompts and images of one length and of two, which takes a mask.
        Without adapters and with one of zeros, for the kernels of those: they have no graphs of their own.
        """
        unguided, guided = {"guidance_scale": 0.0}, self._model.guided_fields
        long = {**guided, "prompt": LONG_PROMPT}
        tall = {**guided, "height": self._model.base_size + EXTRA_HEIGHT}
        # Images of two sizes share a forward of Z-Image alone.
        kinds: tuple[tuple[Mapping[str, Any], ...], ...] = (
            (unguided,),
            (guided,),
            (tall,),
            (guided, long),
            (guided, tall),
        )
        if max_lanes == 1:
            kinds = tuple((fields,) for kind in kinds for fields in kind)
        blank = self._read_blank()
        for kind in kinds:
            self._take_one_step(kind)
            self._take_one_step(kind, blank)

    def load_kernels(self, max_lanes: int) -> None:
        """Take one step in batches of `ROWS` rows, without adapters and with one of zeros.

        The loop halves a batch that does not fit the memory, and caps later ones: the engine starts all the same.
        """
        blank = self._read_blank()
        for num_lanes in lane_counts(max_lanes, self._request().lanes[0].num_rows):
            kind = ({"seeds": tuple(range(num_lanes))},)
            self._take_one_step(kind)
            self._take_one_step(kind, blank)

    def _read_blank(self) -> Future[ReadAdapter]:
        """Return the adapter of zeros as if it had been read."""
        reading: Future[ReadAdapter] = Future()
        packed = self._model.pack(self._model.blank_adapter())
        reading.set_result(ReadAdapter(packed, Stage("adapt", time.monotonic(), 0.0)))
        return reading

    def _take_one_step(self, kind: Sequence[Mapping[str, Any]], blank: Future[ReadAdapter] | None = None) -> None:
        """Run requests, by the fields in which they differ from the usual, for a step that they all take.

        They are cancelled in the turn after it: nothing is decoded. The adapter of zeros is evicted at their end.
        """
        reports: list[list[StepReport]] = [[] for _ in kind]
        adapters = () if blank is None else (BLANK,)

        def has_ended_together() -> bool:
            # One that has failed takes no step.
            return all(own or one.is_ended for own, one in zip(reports, requests, strict=True))

        requests = [
            self._request(
                own.append, has_ended_together, num_inference_steps=NUM_STEPS_CANCELLED, adapters=adapters, **fields
            )
            for own, fields in zip(reports, kind, strict=True)
        ]

        def evict(_: object) -> None:
            if all(one.is_ended for one in requests):
                self._forget(AdapterKey.of(BLANK))

        for active in requests:
            if blank is not None:
                active.readings[AdapterKey.of(BLANK)] = blank
                active.future.add_done_callback(evict)
            self._enqueue(active)
        for active in requests:
            error = active.future.exception()
            if isinstance(error, RequestFailed) and error.code == "GPU_OOM":
                logger.warning("warm-up of %d lanes left out: %s", len(active.lanes), error)
            elif error is not None and not isinstance(error, RequestCancelled):
                raise error

    def _request(
        self,
        on_step: Callable[[StepReport], None] = lambda _: None,
        is_cancelled: Callable[[], bool] = lambda: False,
        **fields: Any,
    ) -> ActiveRequest:
        size = self._model.base_size
        usual: dict[str, Any] = {
            "request_id": "warm-up",
            "prompt": "",
            "negative_prompt": "",
            "width": size,
            "height": size,
            "num_inference_steps": NUM_STEPS,
            # Jobs that name none: under guidance a lane has two rows.
            "guidance_scale": self._model.default_guidance,
            "seeds": (0,),
            "model": self._name,
            "arrived_at": time.monotonic(),
        }
        request = GenerationRequest(**usual | fields)
        if "text2image" not in self._model.kinds:
            # What can only repaint is given a grey image to repaint.
            num_pixels = request.width * request.height
            request = replace(request, source=Source(GREY * 3 * num_pixels, 1.0, WHITE * num_pixels))
        keys = tuple(AdapterKey.of(file) for file in request.adapters)
        return ActiveRequest(request, self._model.batch_traits(request), on_step, is_cancelled, keys)


def lane_counts(max_lanes: int, rows_per_lane: int) -> list[int]:
    """Return the numbers of lanes that make `ROWS`, at most `max_lanes`, fewest first."""
    return sorted({min(max_lanes, max(1, rows // rows_per_lane)) for rows in ROWS})
