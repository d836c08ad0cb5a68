"""Choose which lanes join, and which of them share the next forward. Pure: no torch, no clock, no thread."""

from collections.abc import Callable, Hashable
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

# Forwards at a cap set after an out-of-memory error before one more lane is tried: another process may have caused it.
FORWARDS_UNTIL_RELAXED = 100


class Batchable(Protocol):
    """A lane as the batcher sees it. Only lanes of one `shape` share a forward; a guided lane has two rows."""

    @property
    def shape(self) -> Hashable: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def arrived_at(self) -> float: ...


class Claim(Enum):
    """The answer to a waiting lane's claim to join."""

    GRANTED = auto()
    NOT_YET = auto()  # its adapters are still being read, or memory is short: younger lanes may pass it
    NO_SLOT = auto()  # it waits for what others hold: no younger lane passes it, or it might wait for ever
    WITHDRAWN = auto()  # its request has ended


L = TypeVar("L", bound=Batchable)


class Batcher(Generic[L]):
    """Owner of the waiting and active lanes, and of the order in which their shapes take turns."""

    def __init__(self, max_lanes: int, max_rows: Callable[[Hashable], int]) -> None:
        """`max_rows(shape)`: the rows of a shape that fit the memory free now."""
        self._max_lanes = max_lanes
        self._max_rows = max_rows
        self._waiting: list[L] = []
        self._active: list[L] = []
        self._turns: list[Hashable] = []  # the active shapes, the one whose last turn is longest ago first
        self._caps: dict[Hashable, int] = {}
        self._good_forwards: dict[Hashable, int] = {}

    @property
    def waiting(self) -> tuple[L, ...]:
        return tuple(self._waiting)

    @property
    def active(self) -> tuple[L, ...]:
        return tuple(self._active)

    def add(self, lane: L) -> None:
        """Insert `lane` among the waiting ones, in order of arrival."""
        self._waiting.append(lane)
        self._waiting.sort(key=lambda one: one.arrived_at)

    def admit(self, claim: Callable[[L], Claim]) -> list[L]:
        """Make waiting lanes active, oldest first, while there is room; return those that joined."""
        joined: list[L] = []
        for lane in self.waiting:
            if len(self._active) >= self._max_lanes:
                break
            answer = claim(lane)
            if answer is Claim.NO_SLOT:
                break
            if answer is Claim.GRANTED:
                self._active.append(lane)
                joined.append(lane)
            # `claim` may have removed a withdrawn lane already.
            if answer in (Claim.GRANTED, Claim.WITHDRAWN) and lane in self._waiting:
                self._waiting.remove(lane)
        return joined

    def remove(self, lane: L) -> None:
        """Remove a lane that is done or cancelled, if it is here."""
        for lanes in (self._active, self._waiting):
            if lane in lanes:
                lanes.remove(lane)

    def next_batch(self) -> list[L]:
        """Return the lanes of the next forward: shapes take turns; of one shape the oldest that fit, at least one."""
        if not self._active:
            return []
        shapes = dict.fromkeys(lane.shape for lane in self._active)
        turns = [shape for shape in self._turns if shape in shapes]
        turns += [shape for shape in shapes if shape not in turns]
        self._turns = [*turns[1:], turns[0]]
        return self._fitting(turns[0])

    def halve(self, batch: list[L]) -> list[L]:
        """Return the older half of a batch that did not fit, and cap its shape at that; empty for one lane."""
        half = batch[: len(batch) // 2]
        if half:
            self._caps[half[0].shape] = sum(lane.num_rows for lane in half)
            self._good_forwards[half[0].shape] = 0
        return half

    def make_room(self) -> None:
        """Halve the forwards of every active shape: other work finds no memory beside them."""
        for shape in {lane.shape for lane in self._active}:
            self.halve(self._fitting(shape))

    def note_success(self, batch: list[L]) -> None:
        """Count a forward without an error; after enough of them raise the shape's cap by a lane, at last drop it."""
        shape = batch[0].shape
        if shape not in self._caps:
            return
        self._good_forwards[shape] += 1
        if self._good_forwards[shape] == FORWARDS_UNTIL_RELAXED:
            self._good_forwards[shape] = 0
            self._caps[shape] += 2
            if self._caps[shape] >= self._max_lanes * 2:
                del self._caps[shape]

    def _fitting(self, shape: Hashable) -> list[L]:
        max_rows = min(self._max_rows(shape), self._caps.get(shape, self._max_lanes * 2))
        batch: list[L] = []
        num_rows = 0
        for lane in sorted((one for one in self._active if one.shape == shape), key=lambda one: one.arrived_at):
            num_rows += lane.num_rows
            if batch and num_rows > max_rows:
                break
            batch.append(lane)
        return batch
