"""The time axis that all bars share: idle stretches are cut out of it, or a night would leave nothing else to see."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple


class _Span(NamedTuple):
    begin: float
    end: float
    offset: float  # busy seconds before it


class Axis:
    """Maps moments to seconds of busy time. `seconds` are busy, `idle_seconds` were cut out."""

    def __init__(self, busy: Iterable[tuple[float, float]]) -> None:
        """`busy`: when each job began and ended, in any order."""
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
        """Busy seconds before `moment`."""
        number = bisect_right(self._spans, moment, key=lambda span: span.begin) - 1
        if number < 0:
            return 0.0
        span = self._spans[number]
        return span.offset + min(moment, span.end) - span.begin
