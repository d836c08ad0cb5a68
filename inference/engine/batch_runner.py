"""Run a batch's forward: with fewer lanes where memory ends, lane by lane after any other error."""

import logging
from collections.abc import Callable

import torch

from inference.device.device import Device, Guarded
from inference.engine.batcher import Batcher
from inference.lane import ActiveRequest, Lane
from inference.models.base import Family

logger = logging.getLogger(__name__)


class BatchRunner:
    """Runs the model's forwards, and has requests whose forward fails ended. The loop's thread calls it."""

    def __init__(
        self,
        model: Family,
        device: Device,
        batcher: Batcher[Lane],
        fail: Callable[[ActiveRequest, Exception | None], None],
    ) -> None:
        """`fail` ends a request with its error, and its lanes with it."""
        self._model = model
        self._device = device
        self._batcher = batcher
        self._fail = fail

    def run(self, batch: list[Lane]) -> tuple[list[Lane], list[torch.Tensor]]:
        """Return the lanes that were denoised and their predictions: all of `batch`, fewer, or none."""
        if not batch:
            return [], []
        guarded = self._forward(batch)
        if isinstance(guarded.error, torch.OutOfMemoryError) and self._model.drop_graphs():
            guarded = self._forward(batch)
        while isinstance(guarded.error, torch.OutOfMemoryError) and len(batch) > 1:
            logger.warning("out of memory with %d lanes: trying half of them", len(batch))
            batch = self._batcher.halve(batch)
            guarded = self._forward(batch)
        if guarded.result is not None:
            self._batcher.note_success(batch)
            return batch, guarded.result
        if len(batch) > 1:
            return self._run_one_by_one(batch)
        self._fail(batch[0].owner, guarded.error)
        return [], []

    def _run_one_by_one(self, batch: list[Lane]) -> tuple[list[Lane], list[torch.Tensor]]:
        """Fail only the requests whose lanes fail alone: one lane's error fails a whole batch."""
        predictions: dict[Lane, torch.Tensor] = {}
        for lane in batch:
            if lane.owner.is_ended:
                continue
            guarded = self._forward([lane])
            if guarded.result is None:
                self._fail(lane.owner, guarded.error)
            else:
                (predictions[lane],) = guarded.result
        survivors = {lane: prediction for lane, prediction in predictions.items() if not lane.owner.is_ended}
        return list(survivors), list(survivors.values())

    def _forward(self, batch: list[Lane]) -> Guarded[list[torch.Tensor]]:
        def forward() -> list[torch.Tensor]:
            num_rows = sum(lane.num_rows for lane in batch)
            with self._device.measured(batch[0].shape, num_rows, lambda: self._model.ran_eagerly):
                return self._model.denoise(batch)

        return self._device.guard(forward)
