"""`darkroom outbox`: the terminal events that the backend has not accepted yet."""

import dataclasses
import json

import typer
from rich.console import Console
from rich.text import Text

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from config.settings import Settings
from worker.amqp.delivery import ATTEMPT_HEADER, REASON_HEADER, SINCE_HEADER, whole_number
from worker.amqp.queue_browser import BrowsedMessage, QueueBrowser
from worker.amqp.topology import QueueNames
from worker.cli.terminal import escape_for_terminal, narrow_table
from worker.results.outbox_snapshots import MAX_REASON_CHARS, SnapshotStore, UndeliveredEvent, format_minute, summarize
from worker.results.terminal_event import TerminalEvent

MAX_LISTED = 10_000


def list_waiting(settings: Settings, *, as_lines: bool) -> None:
    """Print a row, or a line of JSON, for each event that waits, the oldest first."""
    waiting = find_waiting(settings)
    if as_lines:
        for one in waiting:
            typer.echo(escape_for_terminal(json.dumps(dataclasses.asdict(one))))
    elif waiting:
        console = Console()
        table = narrow_table("generation", "webhook", "since, UTC", "tries", "last try, and the task")
        for one in waiting:
            since = format_minute(one.since).replace(" ", "\n")
            last = f"{one.reason}\n{one.task_id}".lstrip("\n")
            cells = (str(one.generation_id), one.kind, since, str(one.num_tries), last)
            table.add_row(*(Text("\n".join(map(escape_for_terminal, cell.split("\n")))) for cell in cells))
        console.print(table)
        console.print(Text(escape_for_terminal(summarize(waiting))))
    else:
        typer.echo("no end waits for the backend")


def find_waiting(settings: Settings) -> list[UndeliveredEvent]:
    """Return the events ready in the outbox, and those that workers noted as taken from it; the oldest first.

    Raises `PublishFailed` and `QueueBusy`. Where the store does not answer, a warning is printed and only the queue is
    read.
    """
    with QueueBrowser(settings.broker, QueueNames.of(settings.broker).outbox) as browser:
        ready = [_decode_waiting(message) for message in browser.fetch(MAX_LISTED)]
    try:
        noted = SnapshotStore(Storage(settings.store), settings.store.bucket).read_all()
    except StorageError as error:
        typer.echo(escape_for_terminal(f"what workers hold is not known: {error}"), err=True)
        noted = []
    found = {(one.task_id, one.kind): one for one in (*noted, *filter(None, ready))}
    return sorted(found.values(), key=lambda one: (one.since, one.task_id))


def _decode_waiting(message: BrowsedMessage) -> UndeliveredEvent | None:
    """Decode a message of the outbox; None for one that is no event: a worker will dead-letter it."""
    try:
        event = TerminalEvent.from_json(message.body)
    except ValueError:
        return None
    return UndeliveredEvent(
        task_id=event.task_id,
        generation_id=event.generation_id,
        kind=event.kind.value,
        since=float(whole_number(message.headers.get(SINCE_HEADER), default=0)),
        num_tries=max(0, whole_number(message.headers.get(ATTEMPT_HEADER), default=1) - 1),
        reason=str(message.headers.get(REASON_HEADER, ""))[:MAX_REASON_CHARS],
    )
