"""`darkroom submit`: publish a job as a backend would, and follow it by its record in the ledger."""

import json
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from clients.storage import Storage
from clients.storage_errors import StorageError
from clients.webhooks import WebhookKind
from config.settings import Settings
from worker.broker import Publisher, PublishFailed
from worker.events import TerminalEvent
from worker.job import JobRejected
from worker.ledger import Ledger
from worker.messages import decode, rules_from
from worker.queues import QueueNames

POLL_SECONDS = 0.5


def submit_and_follow(
    settings: Settings, fields: Mapping[str, Any], *, timeout_seconds: float, console: Console
) -> bool:
    """Publish a job with these `data` fields and wait for its end; True where it is complete."""
    task_id = str(uuid.uuid4())
    body = _message(task_id, fields)
    try:
        decode(body, rules_from(settings.model, settings.store))
        _publish(settings, body)
        console.print(f"published as task {task_id}")
        event = _follow(settings, task_id, timeout_seconds, console)
    except (JobRejected, PublishFailed, StorageError) as error:
        console.print("[bold red]Not done:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return False
    return _report(event, timeout_seconds, console)


def _message(task_id: str, fields: Mapping[str, Any]) -> bytes:
    message = {
        "task_id": task_id,
        "type": "image_generation",
        "data": {name: value for name, value in fields.items() if value is not None},
        "created_at": datetime.now(UTC).isoformat(),
    }
    return json.dumps(message).encode()


def _publish(settings: Settings, body: bytes) -> None:
    names = QueueNames(settings.broker.queue)
    publisher = Publisher(settings.broker, names)
    publisher.start()
    try:
        publisher.publish(names.jobs, body)
    finally:
        publisher.close()


def _follow(settings: Settings, task_id: str, timeout_seconds: float, console: Console) -> TerminalEvent | None:
    ledger = Ledger(Storage(settings.store), settings.store.bucket)
    deadline = time.monotonic() + timeout_seconds
    with console.status("waiting for a worker to finish it"):
        while time.monotonic() < deadline:
            event = ledger.find(task_id)
            if event is not None:
                return event
            time.sleep(POLL_SECONDS)
    return None


def _report(event: TerminalEvent | None, timeout_seconds: float, console: Console) -> bool:
    if event is None:
        console.print(f"[bold red]No end after {timeout_seconds:.0f} s:[/] is a worker running?")
        return False
    if event.kind is WebhookKind.FAILED:
        console.print(f"[bold red]failed:[/] {event.body['error_code']}", end=" ")
        console.print(str(event.body["error_message"]), markup=False, highlight=False)
        return False
    console.print(f"[bold green]complete:[/] {event.body['result_url']}", highlight=False)
    for name, start, seconds in event.stages:
        console.print(f"  {name:8} {seconds:8.3f} s, from {start:.3f} s", highlight=False)
    return True
