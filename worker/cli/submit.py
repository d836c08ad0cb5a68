"""`darkroom submit`: publish a job as a backend would, and follow it to its end.

The end is the job's record in the ledger. Until then only queue depths and the number of workers can be observed:
progress goes to the backend alone, by webhook.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from clients.storage.client import Storage
from clients.storage.errors import StorageError, StorageUnavailable
from clients.webhooks import WebhookKind
from config.settings import Settings
from worker.amqp.delivery import Origin
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.messages.decoder import decode, rules_from
from worker.messages.envelope import MESSAGE_TYPE
from worker.messages.job import JobRejected
from worker.outcome import Outcome
from worker.results.ledger import Ledger, key_of
from worker.results.result_urls import ResultUrls
from worker.results.terminal_event import TerminalEvent

POLL_SECONDS = 0.5


def submit_and_follow(
    settings: Settings,
    fields: Mapping[str, Any],
    *,
    origin: Origin,
    timeout_seconds: float,
    console: Console,
) -> bool:
    """Publish a job with these `data` fields and wait for its end; True where it is complete.

    `origin.queue` is one of the settings' queues of jobs.
    """
    task_id = str(uuid.uuid4())
    message = {
        "task_id": task_id,
        "type": MESSAGE_TYPE,
        "data": {name: value for name, value in fields.items() if value is not None},
        "created_at": datetime.now(UTC).isoformat(),
    }
    body = json.dumps(message).encode()
    names = QueueNames.of(settings.broker)
    publisher = Publisher(settings.broker, names)
    try:
        rules = rules_from(settings.model, settings.store, settings.images)
        # The worker's MODELS, which need not be set here, decide about the model.
        decode(body, replace(rules, model_names=(*rules.model_names, str(fields.get("model", "")))))
        # All that takes time comes before: who presses Ctrl-C once the job is published is told how to cancel it.
        storage = Storage(settings.store)
        ledger = Ledger(storage, settings.store.bucket)
        follower = _Follower(task_id, ledger, publisher, names, origin.queue, console)
        publisher.start()
        publisher.publish(origin.queue, body, origin=origin)
        event = follower.follow(timeout_seconds)
        return event is not None and _report(event, ResultUrls(storage, settings.store.results_bucket), console)
    except (JobRejected, PublishFailed, StorageError) as error:
        console.print("[bold red]Not done:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return False
    finally:
        publisher.close()


@dataclass(frozen=True, slots=True)
class _Follower:
    """Poller of the job's record in the ledger, and of the queues until it is there."""

    task_id: str
    ledger: Ledger
    publisher: Publisher
    names: QueueNames
    queue: str
    console: Console

    def follow(self, timeout_seconds: float) -> TerminalEvent | None:
        """Return the end of the published job; None, after printing why, where it does not come in time."""
        try:
            self.console.print(f"published as task {self.task_id}", highlight=False)
            event = self._wait(timeout_seconds)
        except KeyboardInterrupt:
            self._print_goes_on("No longer followed")
            return None
        if event is None:
            self._print_goes_on(f"No end after {timeout_seconds:.0f} s ({self._describe_queues()})")
        return event

    def _wait(self, timeout_seconds: float) -> TerminalEvent | None:
        began_at = time.monotonic()
        with self.console.status("") as status:
            while (waited := time.monotonic() - began_at) < timeout_seconds:
                try:
                    event = self.ledger.find(self.task_id)
                except StorageUnavailable as error:
                    # Neither the job nor the wait is affected.
                    seen = f"the store does not answer: {error}"
                else:
                    if event is not None:
                        return event
                    seen = self._describe_queues()
                status.update(Text(f"{waited:.0f} s: {seen}"))
                time.sleep(POLL_SECONDS)
        return None

    def _describe_queues(self) -> str:
        try:
            depths, num_workers = self.publisher.depths(), self.publisher.num_workers()
        except PublishFailed:
            return "the broker does not answer"
        if num_workers == 0:
            return f"no worker takes jobs from {self.queue}: is one running?"
        if self.queue not in depths:
            return f"{self.queue} is gone or cannot be used: `darkroom check` says more"
        workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
        if depths[self.queue]:
            return f"{depths[self.queue]} wait in the queue for {workers}"
        num_again = sum(depths.get(name, 0) for name in self.names.family(self.queue)[1:])
        again = f", or it is among the {num_again} that wait for another try" if num_again else ""
        return f"the queue is empty: the job is with one of {workers}{again}"

    def _print_goes_on(self, why: str) -> None:
        """Print that the job goes on, where its record will be, and how to cancel it."""
        order = json.dumps({"task_id": self.task_id})
        for line in (
            f"{why}. The job goes on; its end will be in s3://{self.ledger.bucket}/{key_of(self.task_id)}",
            f"To cancel it: darkroom cancel {self.task_id}",
            f"(it publishes {order} to the exchange {self.names.cancel_exchange})",
        ):
            self.console.print(Text(line), soft_wrap=True)


def _report(event: TerminalEvent, urls: ResultUrls, console: Console) -> bool:
    """Print the end of the job; True where it is complete."""
    if event.outcome is Outcome.CANCELLED:
        console.print("[yellow]cancelled[/]")
        return False
    if event.kind is WebhookKind.FAILED:
        console.print(f"[bold red]failed:[/] {event.body['error_code']}", end=" ")
        console.print(str(event.body["error_message"]), markup=False, highlight=False)
        return False
    seconds = event.body["metadata"]["seconds"]
    console.print(f"[bold green]complete:[/] {seconds:.2f} s at work, by {event.worker}", highlight=False)
    for name, start, seconds in event.stages:
        console.print(f"  {name:8} {seconds:8.3f} s, from {start:.3f} s", highlight=False)
    # On standard output, where a script looks for it.
    typer.echo(urls.webhook_of(event).body["result_url"])
    return True
