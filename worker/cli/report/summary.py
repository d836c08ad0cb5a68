"""What the rows come to together: where the time went."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from worker.cli.report.rows import Row


class StageSummary(NamedTuple):
    """One stage over all jobs that had it; `share` of all the jobs' time, 0 to 1."""

    stage: str
    num_jobs: int
    median_seconds: float
    p95_seconds: float
    share: float


def summarise(rows: Sequence[Row]) -> list[StageSummary]:
    """Each stage, the one that takes the most first."""
    by_stage: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        seconds: dict[str, float] = defaultdict(float)
        for stretch in row.stretches:
            seconds[stretch.stage] += stretch.seconds
        for stage, taken in seconds.items():
            by_stage[stage].append(taken)
    total = sum(map(sum, by_stage.values())) or 1.0
    found = [
        StageSummary(stage, len(taken), statistics.median(taken), _p95(taken), sum(taken) / total)
        for stage, taken in by_stage.items()
    ]
    return sorted(found, key=lambda one: -one.share)


def _p95(values: Sequence[float]) -> float:
    """The smallest value that 95 % are not above."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
