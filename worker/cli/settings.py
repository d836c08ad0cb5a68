"""The settings as the commands read them: what is wrong with them is told in sentences, and ends the command."""

import sys
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from config.section import SettingsError
from config.settings import Settings, load_settings, misspelled_names
from worker.messages.decoder import rules_from
from worker.supervisor import ExitCode

console = Console(stderr=True)

Loaded = TypeVar("Loaded")


def settings_or_exit() -> Settings:
    """All of the settings, with a warning for each name that is nearly one."""
    settings = or_exit(whole_settings)
    for doubt in misspelled_names():
        console.print("[yellow]Warning:[/]", end=" ")
        console.print(doubt, markup=False, highlight=False, soft_wrap=True)
    return settings


def whole_settings() -> Settings:
    """All of the settings; raises `SettingsError`."""
    settings = load_settings()
    # Sections that are each right can disagree: a preset's adapter in a bucket that jobs may not read.
    rules_from(settings.model, settings.store, settings.pictures)
    return settings


def or_exit(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives, or the end of the process with the exit code for settings."""
    try:
        return load()
    except SettingsError as error:
        console.print("[bold red]The settings are not right:[/]")
        # Not folded at the terminal's width: a person copies these lines, and programs look for words in them.
        problems = str(error)
        # A name that stands in for a missing setting is in that one's line.
        others = [doubt for doubt in _doubts() if doubt.split()[0] not in problems]
        for line in (problems, *others):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print("docs/settings.md lists every setting; .env.example is a file to begin with.")
        sys.exit(ExitCode.SETTINGS)


def _doubts() -> list[str]:
    try:
        return misspelled_names()
    except SettingsError:
        return []  # .env itself is what is wrong
