"""Find the newest records, read them, and print a timeline or lines of JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clients.storage.client import Storage
from clients.storage.errors import ObjectDamaged, ObjectTooLarge
from config.store import StoreSettings
from worker.cli.report.bars import Axis, Bar, legend
from worker.cli.report.rows import Row, row_of, summarise
from worker.cli.terminal import escape_for_terminal
from worker.results.ledger import LONG_AGO, Entry, Ledger, key_of

NUM_READERS = 8
OUTCOME_STYLES = {"complete": "green", "failed": "bold red", "cancelled": "yellow", "unreadable": "yellow"}
MAX_WORKER_CHARS = 24
MIN_BAR_CELLS = 16
MIN_IDLE_SECONDS = 1.0


def report(settings: StoreSettings, *, last: int, since: timedelta | None, as_lines: bool, console: Console) -> None:
    """Print the jobs that ended last, in the order they began. Raises `StorageError`."""
    ledger = Ledger(Storage(settings), settings.bucket)
    newest = ledger.newest(last, since=LONG_AGO if since is None else datetime.now(UTC) - since)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        found = pool.map(lambda entry: _read(ledger, entry), newest)
    rows = sorted((row for row in found if row is not None), key=lambda row: row.began_at)
    if as_lines:
        for row in rows:
            typer.echo(json.dumps(row.as_object()))
    elif rows:
        print_rows(rows, console)
    else:
        console.print("no job has ended" + ("" if since is None else " since then") + f" in bucket {settings.bucket}")


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the timeline with its legend, and the stages' share of the time."""
    axis = Axis((row.began_at, row.ended_at) for row in rows if row.intervals)
    table = Table(box=None, expand=True, pad_edge=False)
    for header in ("began", "job", "seconds", "outcome", "try", "told", "worker"):
        table.add_column(header, no_wrap=True, justify="right" if header == "seconds" else "left")
    table.add_column(f"{axis.seconds:.1f} s", ratio=1, min_width=MIN_BAR_CELLS)
    beginnings = [datetime.fromtimestamp(row.began_at).astimezone() for row in rows]
    # In local time; with the day where there are several days.
    clock = "%H:%M:%S" if len({moment.date() for moment in beginnings}) == 1 else "%m-%d %H:%M:%S"
    for row, moment in zip(rows, beginnings, strict=True):
        table.add_row(
            moment.strftime(clock),
            "" if row.generation_id is None else str(row.generation_id),
            f"{row.seconds:.2f}" if row.intervals else "",
            Text(escape_for_terminal(row.end), OUTCOME_STYLES.get(row.outcome, "")),
            str(row.attempt) if row.is_readable else "",
            ("yes" if row.is_delivered else "no") if row.is_readable else "",
            Text(escape_for_terminal(row.worker[-MAX_WORKER_CHARS:])),
            Bar(row.intervals, axis),
        )
    console.print(table)
    _print_summary(rows, axis, console)


def _print_summary(rows: Sequence[Row], axis: Axis, console: Console) -> None:
    stages = summarise(rows)
    console.print(legend((one.stage for one in stages), console))
    if axis.idle_seconds > MIN_IDLE_SECONDS:
        console.print(f"{axis.idle_seconds:.0f} s in which no job of these was at work are cut out", highlight=False)
    counts = Counter(row.outcome for row in rows)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    console.print(f"{len(rows)} job{'s' if len(rows) > 1 else ''}: {outcomes}", highlight=False)
    for row in rows:
        if not row.is_readable:
            console.print(Text(escape_for_terminal(f"cannot be read: {key_of(row.task_id)}")))
    if not stages:
        return
    table = Table("stage", "jobs", "median s", "p95 s", "share", box=None, pad_edge=False)
    for one in stages:
        figures = (str(one.num_jobs), f"{one.median_seconds:.3f}", f"{one.p95_seconds:.3f}", f"{one.share:.0%}")
        table.add_row(Text(escape_for_terminal(one.stage)), *figures)
    console.print(table)
    console.print(
        f"most of the time goes into: {stages[0].stage} ({stages[0].share:.0%})", highlight=False, markup=False
    )


def _read(ledger: Ledger, entry: Entry) -> Row | None:
    """Read one record; None where it was deleted since the listing."""
    try:
        event = ledger.find(entry.task_id)
    except (ObjectDamaged, ObjectTooLarge):
        return Row(entry.task_id, entry.modified_at.timestamp(), "unreadable")
    return None if event is None else row_of(entry, event)
