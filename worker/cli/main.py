"""The commands: `darkroom run`, `generate`, `submit`, `cancel`, `report`, `check`, `fonts`, `presets`, `dead`,
`outbox`, `demo`."""

import logging
import re
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from config.broker import BrokerSettings
from config.images import ImageSettings
from config.logs import configure_logging, silence_imports
from config.redacting import quoted
from config.section import load_section
from config.service import ServiceSettings
from config.store import StoreSettings
from inference.libraries import engine_needs
from worker.amqp.delivery import Origin
from worker.cli.dead.group import dead
from worker.cli.exits import (
    console,
    exit_on_failure,
    exit_over,
    or_exit,
    settings_or_exit,
    whole_settings,
)
from worker.cli.options import GenerateOptions, fields_of, with_generate_options
from worker.exit_code import ExitCode
from worker.idle_countdown import IdleCountdown
from worker.messages.generation_id import ID_RULE, is_generation_id
from worker.version import darkroom_version

app = typer.Typer(
    no_args_is_help=True,
    help="Headless image generation worker.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dead, name="dead")
outbox = typer.Typer(no_args_is_help=True, help="Look through the ends that the backend has not taken yet.")
app.add_typer(outbox, name="outbox")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def main() -> None:
    """Run the `darkroom` command."""
    # Every failure ends as one sentence; pika would log a traceback before it. `run` sets up its own logs.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    silence_imports()
    app()


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"darkroom {darkroom_version()}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Take the options in front of a command."""


@app.command()
def run(
    exit_when_idle: Annotated[
        int | None,
        typer.Option(metavar="SECONDS", min=1, help="End with code 0 after so many seconds without a job"),
    ] = None,
) -> None:
    """Work: take jobs from RabbitMQ until SIGTERM. Settings come from the environment and .env."""
    exit_over(engine_needs())
    from worker.supervisor import Supervisor  # noqa: PLC0415 - each command imports only what it needs

    settings = or_exit(whole_settings)
    configure_logging(settings.service.log_level, settings.service.log_format)
    countdown = None if exit_when_idle is None else IdleCountdown(exit_when_idle)
    try:
        supervisor = or_exit(partial(Supervisor, settings, countdown=countdown))
    except OSError as error:
        from worker.cli.check.port import explain_bind_error  # noqa: PLC0415

        # An error of a file names it.
        why = f"CACHE_DIR cannot be used: {error}"
        if error.filename is None:
            why = explain_bind_error(settings.service.metrics_port, error)
        console.print("[bold red]Not started:[/]", end=" ")
        console.print(why, markup=False, highlight=False, soft_wrap=True)
        sys.exit(ExitCode.SETTINGS)
    sys.exit(supervisor.run())


@app.command()
def check(
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each part")] = False,
) -> None:
    """Try every part for real, from the broker to the model, and say what to do about a bad one.

    What is written to the store is removed; no message is taken and no lasting queue made. Exit code 1 where a part is
    not good.
    """
    from worker.cli.check.command import check_everything  # noqa: PLC0415

    sys.exit(0 if check_everything(settings_or_exit(), as_lines=as_json, console=Console()) else 1)


@app.command()
@with_generate_options
def submit(
    options: GenerateOptions,
    generation_id: Annotated[str, typer.Option(help="Id of the generation at the backend, a number or text")],
    timeout: Annotated[float, typer.Option(help="Seconds to follow the job")] = 600.0,
    queue: Annotated[str, typer.Option(help="One of RABBITMQ_QUEUES; default RABBITMQ_QUEUE")] = "",
    priority: Annotated[
        int | None, typer.Option(help="Priority of the message, where the queue sorts by it", min=0, max=255)
    ] = None,
) -> None:
    """Publish a job and follow it until it ends: the address of its picture goes to standard output.

    Adapters and pictures are in the store: s3://bucket/key, or a key of the bucket. Without a seed the job's id gives
    one. Ctrl-C ends the following and not the job. Exit code 1 where the job is not seen complete.
    """
    from worker.cli.submit import submit_and_follow  # noqa: PLC0415

    given = int(generation_id) if re.fullmatch(r"[0-9]{1,19}", generation_id) else generation_id
    if not is_generation_id(given):
        raise typer.BadParameter(f"{quoted(generation_id)} is not {ID_RULE}", param_hint="--generation-id")
    settings = settings_or_exit()
    queues = [one.name for one in settings.broker.consumed]
    if queue and queue not in queues:
        raise typer.BadParameter(f"{quoted(queue)} is not one of {', '.join(queues)}", param_hint="--queue")
    fields = {"generation_id": given, **fields_of(options)}
    is_complete = submit_and_follow(
        settings,
        fields,
        origin=Origin(queue or settings.broker.queue, priority),
        timeout_seconds=timeout,
        console=console,
    )
    sys.exit(0 if is_complete else 1)


@app.command()
def cancel(
    job: Annotated[str, typer.Argument(metavar="ID", help="Id of a task, or of a generation")],
    task: Annotated[bool, typer.Option("--task", help="It is a task's")] = False,
    generation: Annotated[bool, typer.Option("--generation", help="It is a generation's")] = False,
) -> None:
    """Ask all workers to end a job: it fails with CANCELLED, unless it has ended already.

    A UUID may be either's id: without --task or --generation both are asked for. Exit code 1 where no worker hears it.
    """
    from worker.cli.cancel import InvalidId, orders_of  # noqa: PLC0415
    from worker.cli.cancel import cancel as send  # noqa: PLC0415

    if task and generation:
        raise typer.BadParameter("give --task or --generation, not both")
    try:
        orders = orders_of(job, is_task=task, is_generation=generation)
    except InvalidId as error:
        raise typer.BadParameter(str(error), param_hint="ID") from error
    broker = or_exit(partial(load_section, BrokerSettings))
    sys.exit(0 if send(broker, orders, console) else 1)


@app.command()
def report(
    last: Annotated[int, typer.Option(help="How many jobs at most", min=1, max=1000)] = 20,
    since: Annotated[str, typer.Option(help="Only jobs recorded within this time, like 90s, 30m, 1h or 2d")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each job")] = False,
) -> None:
    """Draw a timeline of the last jobs from their records in the bucket.

    The newest are found by the listing's own times: all of `jobs/` is listed, a thousand names a request, and only the
    newest are read. A record is written when its job ends, and once more when the backend has heard of it.
    """
    from worker.cli.report.command import report as print_report  # noqa: PLC0415

    within = None
    if since:
        found = re.fullmatch(r"(\d{1,5})([smhd])", since)
        if found is None:
            raise typer.BadParameter(f"{since!r} is no time like 90s, 30m, 1h or 2d", param_hint="--since")
        within = timedelta(**{UNITS[found[2]]: int(found[1])})
    store = or_exit(partial(load_section, StoreSettings))
    with exit_on_failure(console):
        print_report(store, last=last, since=within, as_lines=as_json, console=Console())


@app.command()
@with_generate_options
def generate(
    options: GenerateOptions,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="PNG or JPEG to write; -2, -3 … are added for more pictures")
    ],
) -> None:
    """Draw with the worker's engine, without broker, store or backend.

    Adapters and pictures are files of this machine. Without a seed it is 0.
    """
    exit_over(engine_needs())
    from worker.cli.generate import draw  # noqa: PLC0415 - brings torch into this process, as no other command does

    fields = {"seed": 0, **fields_of(replace(options, model=None))}
    sys.exit(0 if draw(fields, out, model=options.model, console=console) else 1)


@app.command()
def fonts(
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each family")] = False,
) -> None:
    """List the font families that headlines can be set in, with their styles and scripts. Exit code 1 for none."""
    from worker.cli.fonts import list_fonts  # noqa: PLC0415

    font_dirs = or_exit(partial(load_section, ServiceSettings)).font_dirs
    sys.exit(0 if list_fonts(font_dirs, as_lines=as_json, console=Console()) else 1)


@outbox.command("list")
def outbox_list(
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each")] = False,
) -> None:
    """List the ends that wait for the backend, in the queue and in workers' hands, the oldest first."""
    from worker.cli.outbox import list_waiting  # noqa: PLC0415

    with exit_on_failure(console):
        list_waiting(settings_or_exit(), as_lines=as_json)


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each, with all that it says")] = False,
) -> None:
    """List the styles and industries that jobs may name."""
    from worker.cli.presets import print_presets  # noqa: PLC0415

    print_presets(or_exit(partial(load_section, ImageSettings)), as_lines=as_json, console=Console())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the contact sheet and the timeline")] = Path("out"),
) -> None:
    """Run everything for real on this machine: a broker, a bucket, a backend, a worker and sixteen jobs."""
    from examples.demo.needs import missing_needs  # noqa: PLC0415

    exit_over(missing_needs())
    from examples.demo.main import run_demo  # noqa: PLC0415 - brings libraries of the extra `demo`

    sys.exit(run_demo(out))
