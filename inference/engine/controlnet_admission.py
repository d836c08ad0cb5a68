"""Admit requests with a control: their control image made ready, their ControlNet on the device."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from inference.controlnet.cache import ControlNetCache
from inference.controlnet.guide import Guide, image_of
from inference.lane import ActiveRequest
from inference.models.base import Family

# Runs a function on another thread.
Submit = Callable[[Callable[[], Any]], Future[Any]]


class ControlNetAdmission:
    """Owner of the cache of loaded ControlNets. The loop's thread calls it, but for `prepare`."""

    def __init__(self, model: Family, *, prepare: Submit, load: Submit) -> None:
        """A `load` takes seconds: it needs a thread that runs nothing else that requests wait for."""
        self._model = model
        self._submit = prepare
        self._load = load
        self._cache: ControlNetCache[Future[Any]] = ControlNetCache(model.controlnets.max_bytes)

    def prepare(self, active: ActiveRequest) -> None:
        """Begin to make a new request's control image ready. Thread-safe."""
        if active.request.control is not None:
            active.control_image = self._submit(partial(image_of, active.request, active.request.control))

    def begin_round(self, next_ones: Sequence[ActiveRequest]) -> None:
        """Begin to load what the next requests need, the oldest first, before all that wait claim again."""
        self._cache.begin_round()
        for active in next_ones:
            if self.needs(active) is None:
                break

    def needs(self, active: ActiveRequest) -> list[Future[Any]] | None:
        """Return the futures the request waits for; None where its ControlNet does not fit beside those in use."""
        name, image = self._name_of(active), active.control_image
        is_refused = active.scheduling.done() and active.scheduling.exception() is not None
        if name is None or image is None or is_refused:
            return []
        size = self._model.controlnets.num_bytes(name)
        net = self._cache.get_or_load(name, size, lambda: self._load(partial(self._model.load_control, name)))
        return None if net is None else [image, net]

    def attach(self, active: ActiveRequest) -> None:
        """Give the request, whose futures are done, its guide, and acquire its ControlNet until it ends."""
        control, needed = active.request.control, self.needs(active)
        if control is None or not needed:
            return
        image, net = (one.result() for one in needed)
        active.guide = Guide(net, self._model.encode_control(image), control.scale, control.start, control.end)
        self._cache.acquire(control.model)
        active.control_image = None  # on the host it is 50 MB of 2048x2048

    @property
    def num_bytes_to_come(self) -> int:
        """Memory of the device that ControlNets which are not loaded yet may still take."""
        return max(0, self._model.controlnets.most_bytes - self._cache.num_bytes)

    def free_memory(self, older: Sequence[ActiveRequest], active: ActiveRequest) -> bool:
        """Drop ControlNets that are not in use, but for the request's own and those of older ones; False if there was
        none. Its own is loaded again where that failed."""
        self._forget_failed(active)
        return self._cache.drop_idle(keep={self._name_of(one) for one in (*older, active)})

    def release(self, active: ActiveRequest) -> None:
        """Release the ControlNet of an ended request, begun or not."""
        name = self._name_of(active)
        if name is None:
            return
        if active.guide is not None:
            active.guide = None
            self._cache.release(name)
            return
        # Its failure may be why the request ends. The next request loads it again.
        self._forget_failed(active)

    def _forget_failed(self, active: ActiveRequest) -> None:
        name = self._name_of(active)
        net = None if name is None else self._cache.find(name)
        if name is not None and net is not None and net.done() and net.exception() is not None:
            self._cache.forget(name)

    def _name_of(self, active: ActiveRequest) -> str | None:
        """Return the name of the ControlNet; None for an unknown one, with which the family refuses the request."""
        control = active.request.control
        return control.model if control is not None and control.model in self._model.controlnets.names else None
