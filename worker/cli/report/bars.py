"""The bars of the timeline, coloured by stage, and the time axis that they share."""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from worker.cli.report.rows import StageInterval
from worker.cli.report.stages import STAGES, UNACCOUNTED, style_of
from worker.cli.terminal import escape_for_terminal

MIN_CELLS = 1
BLOCK = "█"


class _Span(NamedTuple):
    begin: float
    end: float
    offset: float  # busy seconds before it


class Axis:
    """Map from moments to seconds of busy time. `seconds` are busy, `idle_seconds` are cut out."""

    def __init__(self, busy: Iterable[tuple[float, float]]) -> None:
        """Merge `busy`, the begin and end of each job, in any order."""
        self._spans: list[_Span] = []
        for begin, end in sorted(busy):
            if self._spans and begin <= self._spans[-1].end:
                last = self._spans.pop()
                self._spans.append(last._replace(end=max(last.end, end)))
            else:
                self._spans.append(_Span(begin, end, self.seconds))

    @property
    def seconds(self) -> float:
        if not self._spans:
            return 0.0
        last = self._spans[-1]
        return last.offset + last.end - last.begin

    @property
    def idle_seconds(self) -> float:
        return self._spans[-1].end - self._spans[0].begin - self.seconds if self._spans else 0.0

    def place(self, moment: float) -> float:
        """Return the busy seconds before `moment`."""
        number = bisect_right(self._spans, moment, key=lambda span: span.begin) - 1
        if number < 0:
            return 0.0
        span = self._spans[number]
        return span.offset + min(moment, span.end) - span.begin


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar as a rich renderable, as wide as its column."""

    intervals: Sequence[StageInterval]
    axis: Axis

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(MIN_CELLS, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bar = Text(no_wrap=True)
        for stage in cells(self.intervals, self.axis, options.max_width):
            bar.append_text(_cell(stage, console))
        yield bar


def cells(intervals: Sequence[StageInterval], axis: Axis, width: int) -> list[str]:
    """Return the stage with the most time in each cell, "" for none. A job has at least one cell."""
    cell_seconds = axis.seconds / width
    if not intervals or cell_seconds <= 0:
        return ["" for _ in range(width)]
    taken: list[dict[str, float]] = [defaultdict(float) for _ in range(width)]
    for interval in intervals:
        begin, end = (axis.place(moment) / cell_seconds for moment in (interval.began_at, interval.ended_at))
        first = min(int(begin), width - 1)
        for number in range(first, min(max(first + 1, math.ceil(end)), width)):
            taken[number][interval.stage] += min(end, number + 1) - max(begin, number)
    return [max(stages, key=lambda name: stages[name]) if stages else "" for stages in taken]


def legend(stages: Iterable[str], console: Console) -> Text:
    """Return the legend of colours or letters, in the order of the stages."""
    shown = set(stages)
    parts = Text()
    for name in (*STAGES, *sorted(shown - STAGES.keys())):
        if name in shown:
            known = name if name in STAGES or name == UNACCOUNTED else f"{UNACCOUNTED} ({name})"
            parts.append_text(_cell(name, console)).append(f"\u00a0{escape_for_terminal(known)}  ")
    return parts


def _cell(stage: str, console: Console) -> Text:
    if not stage:
        return Text(" ")
    look = style_of(stage)
    if console.color_system is None or console.no_color:
        return Text(look.letter)
    return Text(BLOCK, look.colour)
