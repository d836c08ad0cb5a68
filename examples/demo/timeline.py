"""The timeline: where each job's time went, by the stages in the ledger's records."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from examples.demo.jobs import DemoJob
from worker.cli.report.stages import STAGES, style_of
from worker.results.terminal_event import TerminalEvent


def draw_timeline(jobs: Sequence[DemoJob], records: Sequence[TerminalEvent], path: Path) -> None:
    """Write a PNG with one row a job, one colour a stage, in seconds since the first job began."""
    by_id = {record.generation_id: record for record in records}
    begin = min(record.began_at for record in records)
    figure, axes = plt.subplots(figsize=(12, 0.42 * len(jobs) + 1.6))
    for row, job in enumerate(jobs):
        record = by_id[job.generation_id]
        for name, start, seconds in record.stages:
            axes.barh(row, seconds, left=record.began_at - begin + start, height=0.7, color=style_of(name).colour)

    axes.set_yticks(range(len(jobs)), [f"{job.prompt[:32]}  ({job.steps} steps)" for job in jobs])
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the first job was taken")
    axes.legend(
        handles=[Patch(color=look.colour, label=name) for name, look in STAGES.items()],
        ncols=len(STAGES),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        columnspacing=1.0,
        handlelength=1.0,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
