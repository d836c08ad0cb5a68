"""The command group `darkroom dead`: its arguments and options."""

from typing import Annotated

import typer

from worker.cli.exits import console, exit_on_failure, settings_or_exit

dead = typer.Typer(no_args_is_help=True, help="Look through the dead letters, try them again, throw them away.")

# What the commands have in common.
TARGET = typer.Argument(metavar="N|TASK_ID", help="Number in `list`, or the id of a task")
Everything = Annotated[bool, typer.Option("--all", help="All of them")]
Reason = Annotated[str, typer.Option(help="With --all: only those whose reason holds this text")]


@dead.command("list")
def dead_list(
    reason: Annotated[str, typer.Option(help="Only those whose reason holds this text")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each")] = False,
) -> None:
    """List what ended in the dead letter queue, the oldest first."""
    from worker.cli.dead.command import list_letters  # noqa: PLC0415 - each command imports only what it needs

    with exit_on_failure(console):
        list_letters(settings_or_exit(), reason=reason, as_lines=as_json)


@dead.command("show")
def dead_show(target: Annotated[str, TARGET]) -> None:
    """Show everything about a letter: its headers, its reason, its body."""
    from worker.cli.dead.command import show_letters  # noqa: PLC0415

    with exit_on_failure(console):
        show_letters(settings_or_exit(), target)


@dead.command("replay")
def dead_replay(
    target: Annotated[str | None, TARGET] = None, everything: Everything = False, reason: Reason = ""
) -> None:
    """Try letters again: a job as a new task of the same generation, a webhook for another day."""
    from worker.cli.dead.command import replay_letters  # noqa: PLC0415

    _check_target(target, everything, reason)
    with exit_on_failure(console):
        replay_letters(settings_or_exit(), target, reason)


@dead.command("purge")
def dead_purge(
    target: Annotated[str | None, TARGET] = None,
    everything: Everything = False,
    reason: Reason = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Throw letters away for good."""
    from worker.cli.dead.command import purge_letters  # noqa: PLC0415

    _check_target(target, everything, reason)
    with exit_on_failure(console):
        purge_letters(settings_or_exit(), target, reason, is_sure=yes)


def _check_target(target: str | None, everything: bool, reason: str) -> None:
    if (target is None) is not everything:
        raise typer.BadParameter("give either N|TASK_ID or --all")
    if reason and not everything:
        raise typer.BadParameter("--reason belongs to --all")
