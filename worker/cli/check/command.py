"""Run the checks of all parts in order, and print a table or lines of JSON."""

import dataclasses
import json
from functools import partial
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from config.settings import Settings
from inference.libraries import engine_needs
from worker.cli.check.backend import check_backend
from worker.cli.check.broker import BrokerProbe
from worker.cli.check.checks import Check, NotTried, State, run_checks
from worker.cli.check.files import check_certificate, check_fonts, check_presets, check_shaping
from worker.cli.check.machine import check_disk, check_gpu, check_memory
from worker.cli.check.models import Load, check_cutout, check_model, load_in_own_process
from worker.cli.check.port import check_port
from worker.cli.check.result_address import check_result_address
from worker.cli.check.store import StoreProbe
from worker.cli.check.tracing import tracing_checks
from worker.cli.terminal import escape_for_terminal

STYLES = {
    State.GOOD: "green",
    State.BAD: "bold red",
    State.BLOCKED: "yellow",
    State.UNSURE: "yellow",
    State.NOT_TRIED: "dim",
}


def check_everything(settings: Settings, *, as_lines: bool, console: Console) -> bool:
    """Check every part and print the results; True where all that were tried are good."""
    checks, results = every_part(settings), []
    if as_lines:
        for result in run_checks(checks):
            typer.echo(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
            results.append(result)
    else:
        with console.status("") as status:
            results = list(run_checks(checks, on_begin=lambda part: status.update(f"trying the {part}")))
        table = Table("part", "", "what was seen, or what to do")
        for result in results:
            state = Text(result.state.value, STYLES[result.state])
            table.add_row(result.part, state, Text(escape_for_terminal(result.detail)))
        console.print(table)
    return all(result.state in (State.GOOD, State.NOT_TRIED) for result in results)


def every_part(settings: Settings, load: Load = load_in_own_process) -> tuple[Check, ...]:
    """Return the checks, each after those it depends on, the slow one last.

    Without the engine no worker runs on this machine, and what only a worker needs of it is not tried.
    """
    machine = _of_this_machine(settings, load)
    for why in engine_needs():
        machine = tuple(Check(check.part, partial(_not_tried, why)) for check in machine)
    return _of_the_services(settings) + machine


def _of_the_services(settings: Settings) -> tuple[Check, ...]:
    broker, store = BrokerProbe(settings.broker), StoreProbe(settings.store, settings.model.preview_every > 0)
    is_one_bucket = settings.store.results_bucket == settings.store.bucket
    own_buckets = {settings.store.bucket, settings.store.results_bucket}
    return (
        Check("broker", broker.connection),
        Check("queue", broker.queue, ("broker",)),
        Check("own queues", broker.own_queues, ("broker",)),
        Check("store", store.answer),
        Check("bucket", store.bucket, ("store",)),
        Check("results bucket", store.results_bucket, ("store", "bucket") if is_one_bucket else ("store",)),
        *(
            [Check("input buckets", store.input_buckets, ("store",))]
            if settings.store.allowed_buckets - own_buckets
            else []
        ),
        Check("result address", partial(check_result_address, settings.store), ("results bucket",)),
        Check("conditional writes", store.conditional_writes, ("bucket",)),
        Check("presets", partial(check_presets, settings), ("bucket",)),
        Check("backend", partial(check_backend, settings.backend)),
        *tracing_checks(),
    )


def _of_this_machine(settings: Settings, load: Load) -> tuple[Check, ...]:
    return (
        Check("port", partial(check_port, settings.service.metrics_port)),
        Check("fonts", partial(check_fonts, settings.service.font_dirs)),
        Check("shaping", check_shaping),
        Check("certificate", partial(check_certificate, settings.images)),
        Check("cut-outs", partial(check_cutout, settings.images)),
        Check("disk", partial(check_disk, settings.store)),
        Check("GPU", partial(check_gpu, settings.model)),
        Check("memory", partial(check_memory, settings.model), ("GPU",)),
        Check("model", partial(check_model, settings.model, load), ("GPU", "memory")),
    )


def _not_tried(why: str) -> NoReturn:
    raise NotTried(f"no worker runs on this machine: {why}")
