"""One job's times from its record, and their summary. Never a prompt, nor an error's text, which may quote one."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from worker.cli.report.stages import UNACCOUNTED
from worker.messages.generation_id import GenerationId
from worker.results.ledger import Entry
from worker.results.terminal_event import TerminalEvent

# The record is built between the last stage and its time: shorter than this it is no interval of its own.
MIN_REST_SECONDS = 0.05
# Epoch seconds of the year 2242: a later time is damaged, as is NaN.
MAX_MOMENT = float(1 << 33)


class StageInterval(NamedTuple):
    """A stage of a job, from `began_at` in epoch seconds."""

    stage: str
    began_at: float
    seconds: float

    @property
    def ended_at(self) -> float:
        return self.began_at + self.seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One job. `outcome` is complete, failed, cancelled or, of a record that cannot be read, unreadable.

    `intervals` are empty where the record has no times, as those of older workers.
    """

    task_id: str
    modified_at: float
    outcome: str
    generation_id: GenerationId | None = None
    error_code: str = ""
    worker: str = ""
    attempt: int = 1
    is_delivered: bool = False
    intervals: tuple[StageInterval, ...] = ()

    @property
    def is_readable(self) -> bool:
        return self.generation_id is not None

    @property
    def end(self) -> str:
        """Outcome in a word: of a failed job its code."""
        return self.error_code if self.outcome == "failed" and self.error_code else self.outcome

    @property
    def began_at(self) -> float:
        """Start of the first stage, else the time the record was written."""
        return self.intervals[0].began_at if self.intervals else self.modified_at

    @property
    def ended_at(self) -> float:
        return max((interval.ended_at for interval in self.intervals), default=self.modified_at)

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began_at

    def as_object(self) -> dict[str, Any]:
        """Return the row for JSON: times in epoch seconds, stages as name, seconds since `began_at`, seconds."""
        return {
            "task_id": self.task_id,
            "generation_id": self.generation_id,
            "outcome": self.outcome,
            "error_code": self.error_code,
            "attempt": self.attempt,
            "worker": self.worker,
            "is_delivered": self.is_delivered,
            "recorded_at": self.modified_at,
            "began_at": self.began_at if self.intervals else None,
            "seconds": round(self.seconds, 4) if self.intervals else None,
            "stages": [(one.stage, round(one.began_at - self.began_at, 4), one.seconds) for one in self.intervals],
        }


def row_of(entry: Entry, event: TerminalEvent) -> Row:
    """Return the row of a record; times that are no numbers are left out."""
    return Row(
        task_id=entry.task_id,
        modified_at=entry.modified_at.timestamp(),
        outcome=event.outcome,
        generation_id=event.generation_id,
        error_code=str(event.body.get("error_code", "")),
        worker=str(event.worker),
        attempt=event.attempt if isinstance(event.attempt, int) else 1,
        is_delivered=event.is_delivered is True,
        intervals=_intervals(event),
    )


def _intervals(event: TerminalEvent) -> tuple[StageInterval, ...]:
    if not event.began_at:
        return ()
    try:
        found = [
            StageInterval(str(name), event.began_at + start, float(seconds)) for name, start, seconds in event.stages
        ]
        reached = max((interval.ended_at for interval in found), default=event.began_at)
        if event.ended_at - reached > MIN_REST_SECONDS:
            found.append(StageInterval(UNACCOUNTED, reached, event.ended_at - reached))
    except (TypeError, ValueError, OverflowError):
        return ()
    is_sound = all(0 <= one.seconds < MAX_MOMENT and 0 < one.began_at < MAX_MOMENT for one in found)
    return tuple(sorted(found, key=lambda one: one.began_at)) if is_sound else ()


class StageSummary(NamedTuple):
    """One stage over all jobs that had it; `share` of all the jobs' time, 0 to 1."""

    stage: str
    num_jobs: int
    median_seconds: float
    p95_seconds: float
    share: float


def summarise(rows: Sequence[Row]) -> list[StageSummary]:
    """Summarise each stage, the one with the most time first."""
    by_stage: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        seconds: dict[str, float] = defaultdict(float)
        for interval in row.intervals:
            seconds[interval.stage] += interval.seconds
        for stage, taken in seconds.items():
            by_stage[stage].append(taken)
    total = sum(map(sum, by_stage.values())) or 1.0
    found = []
    for stage, times in by_stage.items():
        # The smallest time that 95 % of the times do not exceed.
        p95 = sorted(times)[math.ceil(0.95 * len(times)) - 1]
        found.append(StageSummary(stage, len(times), statistics.median(times), p95, sum(times) / total))
    return sorted(found, key=lambda one: -one.share)
