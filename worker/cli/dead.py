"""`darkroom dead`: looking through the dead letters, trying them again, and throwing them away."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from clients.storage.client import Storage
from clients.storage.errors import StorageError
from config.settings import Settings
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.queue_browser import QueueBrowser, QueueBusy
from worker.amqp.topology import QueueNames
from worker.cli.dead_letters import (
    DeadLetter,
    LetterKind,
    NoSuchLetter,
    NotReplayable,
    Replay,
    as_json,
    as_table,
    as_text,
    choose,
    plan_replay,
    read_letters,
)
from worker.cli.outbox import print_summary
from worker.cli.terminal import escape_for_terminal
from worker.messages.decoder import rules_from
from worker.results.ledger import Ledger

# At 64 kB each, the most that a letter without a job has, they take 640 MB.
MAX_LETTERS = 10_000


class Refused(Exception):
    """The command cannot be done; the message is the sentence for the person who gave it."""


def list_letters(settings: Settings, *, reason: str, as_lines: bool) -> None:
    """Print a table of the letters, or a line of JSON for each."""
    with _letters(settings) as (_, letters):
        chosen = choose(letters, None, reason)
    if as_lines:
        for letter in chosen:
            typer.echo(as_json(letter))
        return
    if chosen:
        Console().print(as_table(chosen))
    else:
        typer.echo(_nothing(letters))
    # What waits is not dead yet, but may be tomorrow.
    print_summary(settings)


def show_letters(settings: Settings, target: str) -> None:
    """Print all there is to know of the letter, or of each letter of the task."""
    with _letters(settings) as (_, letters):
        chosen = choose(letters, target, "")
    typer.echo("\n\n".join(map(as_text, chosen)))


def replay_letters(settings: Settings, target: str | None, reason: str) -> None:
    """Try the letters again. Each is acked once its copy is confirmed; one of many that cannot be replayed stays."""
    names = QueueNames(settings.broker.queue)
    ledger = Ledger(Storage(settings.store), settings.store.bucket)
    publisher = Publisher(settings.broker, names)
    publisher.start()
    num_replayed = 0
    try:
        with _letters(settings) as (inspection, letters):
            chosen = choose(letters, target, reason)
            for letter in chosen:
                try:
                    replay = plan_replay(letter, ledger.find)
                except NotReplayable as obstacle:
                    typer.echo(escape_for_terminal(f"letter {letter.number} stays: {obstacle}"))
                    continue
                _publish(publisher, names, replay)
                typer.echo(f"letter {letter.number}: {replay.said}")
                inspection.ack(letter.held)
                num_replayed += 1
    finally:
        publisher.close()
    if target is None and not chosen:
        typer.echo(_nothing(letters))
        return
    typer.echo(f"{num_replayed} of {_letters_of(len(chosen))} replayed")
    if target is not None and num_replayed < len(chosen):
        raise Refused("not everything could be replayed; `darkroom dead purge` throws a letter away")


def purge_letters(settings: Settings, target: str | None, reason: str, *, is_sure: bool) -> None:
    """Throw letters away: those that the person has just been shown, and no others."""
    with _letters(settings) as (inspection, letters):
        chosen = choose(letters, target, reason)
        if is_sure:
            _forget(inspection, chosen)
    if not chosen:
        typer.echo(_nothing(letters))
        return
    if not is_sure:
        Console().print(as_table(chosen))
        typer.confirm(f"Throw {_letters_of(len(chosen))} away for good?", abort=True)
        # Nothing was held while the person thought: the broker would have taken it back after half an hour.
        with _letters(settings) as (inspection, letters):
            still_there = _again(chosen, letters)
            _forget(inspection, still_there)
        if len(still_there) < len(chosen):
            typer.echo(f"{_letters_of(len(chosen) - len(still_there))} had gone meanwhile")
        chosen = still_there
    typer.echo(f"{_letters_of(len(chosen))} purged")


@contextmanager
def sentences(console: Console) -> Iterator[None]:
    """Turn what can go wrong into one sentence and exit code 1."""
    try:
        yield
    except PublishFailed as error:
        _fail(console, f"the broker cannot be used: {error}")
    except (Refused, NoSuchLetter, QueueBusy, StorageError) as error:
        _fail(console, str(error))


def _fail(console: Console, sentence: str) -> None:
    console.print("[bold red]Not done:[/]", Text(escape_for_terminal(sentence)))
    raise typer.Exit(1)


@contextmanager
def _letters(settings: Settings) -> Iterator[tuple[QueueBrowser, list[DeadLetter]]]:
    """The dead letters, held until the block ends; what it has not acked stays where it was."""
    with QueueBrowser(settings.broker, QueueNames(settings.broker.queue).dead) as inspection:
        taken = inspection.fetch(MAX_LETTERS)
        if len(taken) == MAX_LETTERS:
            typer.echo(f"only {MAX_LETTERS} letters were looked at; there may be more", err=True)
        yield inspection, read_letters(taken, rules_from(settings.model, settings.store, settings.pictures))


def _publish(publisher: Publisher, names: QueueNames, replay: Replay) -> None:
    if replay.kind is LetterKind.EVENT:
        publisher.publish(names.outbox, replay.body, since=time.time())
    else:
        publisher.publish(names.jobs, replay.body)


def _forget(inspection: QueueBrowser, letters: list[DeadLetter]) -> None:
    for letter in letters:
        inspection.ack(letter.held)


def _again(chosen: list[DeadLetter], letters: list[DeadLetter]) -> list[DeadLetter]:
    """Those of `letters` that are `chosen` ones, found again; of equal ones no more than were chosen."""
    wanted = Counter(letter.fingerprint for letter in chosen)
    found = []
    for letter in letters:
        if wanted[letter.fingerprint] > 0:
            wanted[letter.fingerprint] -= 1
            found.append(letter)
    return found


def _letters_of(count: int) -> str:
    return "1 letter" if count == 1 else f"{count} letters"


def _nothing(letters: list[DeadLetter]) -> str:
    return f"none of {_letters_of(len(letters))} has such a reason" if letters else "nothing is dead"
