"""What requests with a control need before their first step: a picture made ready, a ControlNet on the device."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from inference.controlnet.cache import ControlNetCache
from inference.controlnet.guide import Guide, picture_of
from inference.lane import ActiveRequest
from inference.models.base import Family

# Has work done on another thread.
Submit = Callable[[Callable[[], Any]], Future[Any]]


class ControlNetAdmission:
    """Owner of the shelf of loaded ControlNets. The loop's thread calls it, but for `prepare`."""

    def __init__(self, model: Family, *, prepare: Submit, load: Submit) -> None:
        """A `load` takes seconds: nothing that other requests wait for is to stand behind it."""
        self._model = model
        self._submit = prepare
        self._load = load
        self._shelf: ControlNetCache[Future[Any]] = ControlNetCache(model.controlnets.max_bytes)

    def prepare(self, active: ActiveRequest) -> None:
        """Begin to make a new request's picture ready. On any thread."""
        if active.request.control is not None:
            active.control_picture = self._submit(partial(picture_of, active.request, active.request.control))

    def begin_round(self, next_ones: Sequence[ActiveRequest]) -> None:
        """All that wait ask again, the oldest first; load already what those that come next need."""
        self._shelf.begin_round()
        for active in next_ones:
            if self.needs(active) is None:
                break

    def needs(self, active: ActiveRequest) -> list[Future[Any]] | None:
        """What the request waits for; None where its ControlNet finds no place beside those that others use."""
        name, picture = self._name_of(active), active.control_picture
        is_refused = active.scheduling.done() and active.scheduling.exception() is not None
        if name is None or picture is None or is_refused:
            return []
        size = self._model.controlnets.num_bytes(name)
        net = self._shelf.get_or_load(name, size, lambda: self._load(partial(self._model.load_control, name)))
        return None if net is None else [picture, net]

    def attach(self, active: ActiveRequest) -> None:
        """Give the request, which needs nothing more, its guide, and hold its ControlNet there until it ends."""
        control, needed = active.request.control, self.needs(active)
        if control is None or not needed:
            return
        picture, net = (one.result() for one in needed)
        active.guide = Guide(net, self._model.encode_control(picture), control.scale, control.start, control.end)
        self._shelf.acquire(control.model)
        active.control_picture = None  # on the host it is 50 MB of 2048x2048

    @property
    def num_bytes_to_come(self) -> int:
        """What ControlNets that are not loaded may still take on the device."""
        return max(0, self._model.controlnets.most_bytes - self._shelf.num_bytes)

    def relieve(self, older: Sequence[ActiveRequest], active: ActiveRequest) -> bool:
        """Free the memory of ControlNets that are not in use, but for the request's own and those of older ones; was
        there any? Its own is loaded anew where that failed."""
        self._forget_failed(active)
        return self._shelf.drop_idle(keep={self._name_of(one) for one in (*older, active)})

    def release(self, active: ActiveRequest) -> None:
        """The request ends, begun or not."""
        name = self._name_of(active)
        if name is None:
            return
        if active.guide is not None:
            active.guide = None
            self._shelf.release(name)
            return
        # Perhaps that is why it ends. Whoever comes next tries once more.
        self._forget_failed(active)

    def _forget_failed(self, active: ActiveRequest) -> None:
        name = self._name_of(active)
        net = None if name is None else self._shelf.find(name)
        if name is not None and net is not None and net.done() and net.exception() is not None:
            self._shelf.forget(name)

    def _name_of(self, active: ActiveRequest) -> str | None:
        """The ControlNet, where there is one of that name: otherwise the family refuses the request."""
        control = active.request.control
        return control.model if control is not None and control.model in self._model.controlnets.names else None
