"""Switch between the engine's models: each in turn where they fit the device together, one for another where not."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from config.logs import log_event
from inference.engine.switching.decision import is_due
from inference.engine.switching.engine_model import EngineModel
from inference.errors import EngineError, RequestFailed
from inference.lane import ActiveRequest, BatchTraits
from inference.request import NO_LOAD, EngineLoad, GenerationRequest, ModelLoad, OnLoadReport

logger = logging.getLogger(__name__)


class Switcher:
    """Owner of the engine's models. The engine's thread calls it."""

    def __init__(
        self,
        *,
        num_bytes: int | None,
        full_batch: int,
        on_load_report: OnLoadReport,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_bytes` of the device are for models (None: all fit); `full_batch` is the number of lanes.

        `on_load_report` is called before a switch.
        """
        self._num_bytes = num_bytes
        self._full_batch = full_batch
        self._on_load_report = on_load_report
        self._clock = clock
        self._models: dict[str, EngineModel] = {}
        self._closed: frozenset[str] = frozenset()
        self._last: EngineModel | None = None

    @property
    def is_empty(self) -> bool:
        return all(model.loop.is_empty for model in self._models.values())

    @property
    def has_work(self) -> bool:
        """False while every request waits to be prepared: a step would do nothing."""
        return any(model.loop.has_work for model in self._models.values() if model.is_on_device)

    def add(self, model: EngineModel) -> None:
        """Add a model before its first request."""
        self._models = {**self._models, model.name: model}

    def traits_of(self, request: GenerationRequest) -> BatchTraits:
        """Return the request's place in the batches of its model. Thread-safe."""
        return self._models[request.model].family.batch_traits(request)

    def prepare(self, active: ActiveRequest) -> None:
        """Begin to make a request ready that will be added. Thread-safe."""
        self._models[active.request.model].loop.prepare(active)

    def add_request(self, active: ActiveRequest) -> None:
        """Add a request that was given to `prepare`."""
        self._models[active.request.model].loop.add(active)

    def step(self) -> EngineLoad:
        """Switch where it is due, and have one of the models on the device take a turn of its loop."""
        self._switch_where_due()
        model = self._choose_turn()
        for other in self._models.values():
            if other is not model:
                other.loop.drop_cancelled()
        if model is None:
            return NO_LOAD
        model.used_at, self._last = self._clock(), model
        load = model.loop.step(may_begin=model.name not in self._closed)
        return load if len(self._models) == 1 else self._sum(load.num_batched)

    def withdraw_waiting(self) -> None:
        """Cancel every request that has not begun."""
        for model in self._models.values():
            model.loop.withdraw_waiting()

    def fail_all(self, error: EngineError) -> None:
        """End every request with `error`."""
        for model in self._models.values():
            model.loop.fail_all(error)

    def close(self) -> None:
        for model in self._models.values():
            model.loop.close()

    def _choose_turn(self) -> EngineModel | None:
        """Return the model on the device whose turn is longest ago, of those with requests."""
        present = [model for model in self._models.values() if model.is_on_device]
        busy = [model for model in present if not model.loop.is_empty]
        return min(busy or present, key=lambda model: model.used_at, default=None)

    def _switch_where_due(self) -> None:
        """Let in the model whose request waits longest for it, once those that make way have no request running."""
        self._closed = frozenset()
        waiting = [model for model in self._models.values() if not model.is_on_device and model.loop.waiting]
        if not waiting:
            return
        coming = min(waiting, key=lambda model: model.standing().oldest_at)
        leaving = self._find_leaving(coming)
        if leaving is None:
            return
        if any(model.loop.num_begun for model in leaving):
            self._closed = frozenset(model.name for model in leaving)
        else:
            self._switch(coming, leaving)

    def _find_leaving(self, coming: EngineModel) -> list[EngineModel] | None:
        """Return the models that make way: those without requests first, then those used longest ago.

        None where one of them is to stay for now.
        """
        if self._num_bytes is None:
            return []
        present = [model for model in self._models.values() if model.is_on_device]
        missing = coming.num_bytes + sum(model.num_bytes for model in present) - self._num_bytes
        leaving: list[EngineModel] = []
        for model in sorted(present, key=lambda one: (not one.loop.is_empty, one.used_at)):
            if missing <= 0:
                break
            leaving.append(model)
            missing -= model.num_bytes
        standing, now = coming.standing(), self._clock()
        for model in leaving:
            if not is_due(
                standing,
                model.standing(),
                now=now,
                switch_seconds=coming.switch_seconds,
                full_batch=self._full_batch,
            ):
                return None
        return leaving

    def _switch(self, coming: EngineModel, leaving: Sequence[EngineModel]) -> None:
        self._on_load_report(replace(self._sum(0), switching_to=coming.name))
        started_at = self._clock()
        waited_seconds = started_at - coming.standing().oldest_at
        for model in leaving:
            model.leave()
        if leaving and torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            coming.enter(self._clock())
        except torch.OutOfMemoryError as error:
            reason = f"the model {coming.name} does not fit the GPU's memory ({error}): end what else runs there"
            for active in coming.loop.waiting:
                coming.loop.fail(active, RequestFailed("GPU_OOM", reason))
            return
        coming.switch_seconds = self._clock() - started_at
        log_event(
            logger,
            "model switched",
            model=coming.name,
            left=",".join(model.name for model in leaving),
            seconds=round(coming.switch_seconds, 3),
            waited_seconds=round(waited_seconds, 1),
        )

    def _sum(self, num_batched: int) -> EngineLoad:
        """Return the load of all models after a turn whose forward had `num_batched` lanes."""
        loads = {model.name: model.loop.load() for model in self._models.values()}
        return EngineLoad(
            num_batched=num_batched,
            num_lanes=sum(one.num_lanes for one in loads.values()),
            slots_active=sum(one.slots_active for one in loads.values()),
            slots_idle=sum(one.slots_idle for one in loads.values()),
            slots_free=sum(one.slots_free for one in loads.values()),
            models=tuple(
                ModelLoad(
                    name=model.name,
                    is_on_device=model.is_on_device,
                    num_waiting=len(model.loop.waiting),
                    num_lanes=loads[model.name].num_lanes,
                    slots_active=loads[model.name].slots_active,
                    slots_idle=loads[model.name].slots_idle,
                )
                for model in self._models.values()
            ),
        )
