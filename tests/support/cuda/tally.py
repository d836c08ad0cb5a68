"""Tally of a device's work: kernels launched, copies made, and waits of the host."""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.support.cuda.roofline import Launch
from tests.support.paths import ROOT


class Event(NamedTuple):
    """Something that the host does to the device beside launching kernels, and the project's line that does it.

    `what`: "upload", "download" or "sync", and of a sync which operation; `detail` of a copy is its shape.
    """

    what: str
    where: str
    detail: str
    is_pinned: bool = False
    is_blocking: bool = True

    @property
    def stalls(self) -> bool:
        """True where the host waits for the device to finish all that it was given."""
        return self.is_blocking or not self.is_pinned

    def __str__(self) -> str:
        if self.what == "sync":
            return f"sync {self.detail} at {self.where}"
        manner = f"{'pinned' if self.is_pinned else 'pageable'}, {'blocking' if self.is_blocking else 'non-blocking'}"
        return f"{self.what} {self.detail} ({manner}) at {self.where}"


class Tally:
    """What ran inside `FakeCuda.counting`: kernels and their work by the part that launched them, and events."""

    def __init__(self) -> None:
        self.kernels: dict[str, Counter[str]] = defaultdict(Counter)
        self.launches: dict[str, list[Launch]] = defaultdict(list)
        self.events: list[Event] = []

    def add(self, part: str, launches: Sequence[Launch]) -> None:
        """Add kernels of a part."""
        self.kernels[part].update(launch.kernel for launch in launches)
        self.launches[part] += launches

    def num_kernels(self, part: str) -> int:
        return self.kernels[part].total()

    @property
    def num_masked_attentions(self) -> int:
        return sum(kernels["masked_attention"] for kernels in self.kernels.values())

    @property
    def stalls(self) -> list[str]:
        return [str(event) for event in self.events if event.stalls]


def line_at_work() -> str:
    """Return the line of the project's own code that is running, `file:line`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/inference/"):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the engine"
