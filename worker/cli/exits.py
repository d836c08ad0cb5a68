"""End a command on an error: one sentence on standard error, and an exit code."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import typer
from rich.console import Console
from rich.text import Text

from clients.storage.errors import StorageError
from config.section import SettingsError
from config.settings import Settings, load_settings, misspelled_names
from worker.amqp.publisher import PublishFailed
from worker.amqp.queue_browser import QueueBusy
from worker.cli.terminal import escape_for_terminal
from worker.exit_code import ExitCode
from worker.messages.decoder import rules_from

console = Console(stderr=True)

Loaded = TypeVar("Loaded")


class CommandFailed(Exception):
    """The command cannot be done; the message is the sentence that the user reads."""


def settings_or_exit() -> Settings:
    """Load all settings, and warn of each name that is nearly one."""
    settings = or_exit(whole_settings)
    for doubt in misspelled_names():
        console.print("[yellow]Warning:[/]", end=" ")
        console.print(doubt, markup=False, highlight=False, soft_wrap=True)
    return settings


def whole_settings() -> Settings:
    """Load all settings. Raises `SettingsError`."""
    settings = load_settings()
    # Sections that are each right can disagree: a preset's adapter in a bucket that jobs may not read.
    rules_from(settings.model, settings.store, settings.images)
    return settings


def or_exit(load: Callable[[], Loaded]) -> Loaded:
    """Return what `load` returns; on `SettingsError` print it and exit with the code for settings."""
    try:
        return load()
    except SettingsError as error:
        console.print("[bold red]The settings are not right:[/]")
        # Not folded at the terminal's width: people copy these lines, and programs search them for words.
        problems = str(error)
        others: list[str] = []
        with suppress(SettingsError):  # .env itself may be what is wrong
            # A near miss that stands in for a missing setting is named in that setting's line.
            others = [doubt for doubt in misspelled_names() if doubt.split()[0] not in problems]
        for line in (problems, *others):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print("docs/settings.md lists every setting; .env.example is a file to begin with.")
        sys.exit(ExitCode.SETTINGS)


def exit_over(needs: Sequence[str]) -> None:
    """Print each sentence on what this machine is missing for a command, and exit with the code for settings."""
    for need in needs:
        console.print("[bold red]Not started:[/]", end=" ")
        console.print(need, markup=False, highlight=False, soft_wrap=True)
    if needs:
        sys.exit(ExitCode.SETTINGS)


@contextmanager
def exit_on_failure(console: Console) -> Iterator[None]:
    """Print a failure of the block as one sentence, and exit with code 1."""
    try:
        yield
    except (PublishFailed, CommandFailed, QueueBusy, StorageError) as error:
        sentence = f"the broker cannot be used: {error}" if isinstance(error, PublishFailed) else str(error)
        console.print("[bold red]Not done:[/]", Text(escape_for_terminal(sentence)))
        raise typer.Exit(1) from error
