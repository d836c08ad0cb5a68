"""The commands on dead letters: list, show, replay, purge."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from clients.storage.client import Storage
from config.settings import Settings
from worker.amqp.publisher import Publisher
from worker.amqp.queue_browser import QueueBrowser
from worker.amqp.topology import QueueNames
from worker.cli.dead.letters import DeadLetter, LetterKind, choose, read_letters
from worker.cli.dead.replay import NotReplayable, plan_replay
from worker.cli.dead.view import as_json, as_table, as_text
from worker.cli.exits import CommandFailed
from worker.cli.outbox import find_waiting
from worker.cli.terminal import escape_for_terminal
from worker.messages.decoder import rules_from
from worker.results.ledger import Ledger
from worker.results.outbox_snapshots import summarize

# At 64 kB each, the most that a letter without a job has, they take 640 MB.
MAX_LETTERS = 10_000


def list_letters(settings: Settings, *, reason: str, as_lines: bool) -> None:
    """Print a table of the letters, or a line of JSON for each."""
    with _browse_letters(settings) as (_, letters):
        chosen = choose(letters, None, reason)
    if as_lines:
        for letter in chosen:
            typer.echo(as_json(letter))
        return
    if chosen:
        Console().print(as_table(chosen))
    else:
        typer.echo(_none_chosen(letters))
    # What waits in the outbox is not dead yet, but may be tomorrow.
    if waiting := find_waiting(settings):
        typer.echo(escape_for_terminal(f"{summarize(waiting)}. `darkroom outbox list` shows them"))


def show_letters(settings: Settings, target: str) -> None:
    """Print everything in the letter, or in each letter of the task."""
    with _browse_letters(settings) as (_, letters):
        chosen = choose(letters, target, "")
    typer.echo("\n\n".join(map(as_text, chosen)))


def replay_letters(settings: Settings, target: str | None, reason: str) -> None:
    """Publish the letters again. Each is acked once its copy is confirmed; one that cannot be replayed stays."""
    names = QueueNames.of(settings.broker)
    ledger = Ledger(Storage(settings.store), settings.store.bucket)
    publisher = Publisher(settings.broker, names)
    publisher.start()
    num_replayed = 0
    try:
        with _browse_letters(settings) as (browser, letters):
            chosen = choose(letters, target, reason)
            for letter in chosen:
                try:
                    replay = plan_replay(letter, ledger.find)
                except NotReplayable as obstacle:
                    typer.echo(escape_for_terminal(f"letter {letter.number} stays: {obstacle}"))
                    continue
                if replay.kind is LetterKind.EVENT:
                    publisher.publish(names.outbox, replay.body, since=time.time())
                else:
                    queue = names.known(letter.origin.queue)
                    publisher.publish(queue, replay.body, origin=letter.origin._replace(queue=queue))
                typer.echo(f"letter {letter.number}: {replay.effect}")
                browser.ack(letter.message)
                num_replayed += 1
    finally:
        publisher.close()
    if target is None and not chosen:
        typer.echo(_none_chosen(letters))
        return
    typer.echo(f"{num_replayed} of {_count_letters(len(chosen))} replayed")
    if target is not None and num_replayed < len(chosen):
        raise CommandFailed("not everything could be replayed; `darkroom dead purge` throws a letter away")


def purge_letters(settings: Settings, target: str | None, reason: str, *, is_sure: bool) -> None:
    """Delete letters: only those that the user has just been shown."""
    with _browse_letters(settings) as (browser, letters):
        chosen = choose(letters, target, reason)
        if is_sure:
            for letter in chosen:
                browser.ack(letter.message)
    if not chosen:
        typer.echo(_none_chosen(letters))
        return
    if not is_sure:
        Console().print(as_table(chosen))
        typer.confirm(f"Throw {_count_letters(len(chosen))} away for good?", abort=True)
        # Nothing was held at the prompt: the broker would have requeued it after half an hour.
        with _browse_letters(settings) as (browser, letters):
            still_there = _find_again(chosen, letters)
            for letter in still_there:
                browser.ack(letter.message)
        if len(still_there) < len(chosen):
            typer.echo(f"{_count_letters(len(chosen) - len(still_there))} had gone meanwhile")
        chosen = still_there
    typer.echo(f"{_count_letters(len(chosen))} purged")


@contextmanager
def _browse_letters(settings: Settings) -> Iterator[tuple[QueueBrowser, list[DeadLetter]]]:
    """Hold the dead letters unacked until the block ends; what it has not acked is requeued in its place."""
    with QueueBrowser(settings.broker, QueueNames.of(settings.broker).dead) as browser:
        taken = browser.fetch(MAX_LETTERS)
        if len(taken) == MAX_LETTERS:
            typer.echo(f"only {MAX_LETTERS} letters were looked at; there may be more", err=True)
        yield browser, read_letters(taken, rules_from(settings.model, settings.store, settings.images))


def _find_again(chosen: list[DeadLetter], letters: list[DeadLetter]) -> list[DeadLetter]:
    """Return those of `letters` that are `chosen` ones; of equal ones no more than were chosen."""
    wanted = Counter(letter.fingerprint for letter in chosen)
    found = []
    for letter in letters:
        if wanted[letter.fingerprint] > 0:
            wanted[letter.fingerprint] -= 1
            found.append(letter)
    return found


def _count_letters(count: int) -> str:
    return "1 letter" if count == 1 else f"{count} letters"


def _none_chosen(letters: list[DeadLetter]) -> str:
    return f"none of {_count_letters(len(letters))} has such a reason" if letters else "nothing is dead"
