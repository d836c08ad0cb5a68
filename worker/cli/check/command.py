"""All parts in the order they are tried, and the table or the lines of JSON that come of it."""

import dataclasses
import json
from collections.abc import Iterable
from functools import partial

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from config.settings import Settings
from worker.cli.check.backend import check_backend
from worker.cli.check.broker import BrokerProbe
from worker.cli.check.checks import Check, CheckResult, State, run_checks
from worker.cli.check.files import check_certificate, check_fonts, check_presets, check_shaping
from worker.cli.check.machine import check_disk, check_gpu, check_memory
from worker.cli.check.models import Load, check_cutout, check_model, load_in_own_process
from worker.cli.check.port import check_port
from worker.cli.check.store import StoreProbe
from worker.cli.terminal import escape_for_terminal

STYLES = {State.GOOD: "green", State.BAD: "bold red", State.BLOCKED: "yellow", State.UNSURE: "yellow"}


def check_everything(settings: Settings, *, as_lines: bool, console: Console) -> bool:
    """Print what was found of every part; True where all are good."""
    checks = every_part(settings)
    findings = _print_lines(checks) if as_lines else _print_table(checks, console)
    return all(finding.state is State.GOOD for finding in findings)


def every_part(settings: Settings, load: Load = load_in_own_process) -> tuple[Check, ...]:
    """The checks, each behind those it stands on, the slow one last."""
    broker, store = BrokerProbe(settings.broker), StoreProbe(settings.store)
    is_one_bucket = settings.store.results_bucket == settings.store.bucket
    return (
        Check("broker", broker.connection),
        Check("queue", broker.queue, ("broker",)),
        Check("own queues", broker.own_queues, ("broker",)),
        Check("store", store.answer),
        Check("bucket", store.bucket, ("store",)),
        Check("results bucket", store.results_bucket, ("store", "bucket") if is_one_bucket else ("store",)),
        Check("conditional writes", store.conditional_writes, ("bucket",)),
        Check("presets", partial(check_presets, settings), ("bucket",)),
        Check("backend", partial(check_backend, settings.backend)),
        Check("port", partial(check_port, settings.service.metrics_port)),
        Check("fonts", partial(check_fonts, settings.service.font_dirs)),
        Check("shaping", check_shaping),
        Check("certificate", partial(check_certificate, settings.pictures)),
        Check("cut-outs", partial(check_cutout, settings.pictures)),
        Check("disk", partial(check_disk, settings.store)),
        Check("GPU", partial(check_gpu, settings.model)),
        Check("memory", partial(check_memory, settings.model), ("GPU",)),
        Check("model", partial(check_model, settings.model, load), ("GPU", "memory")),
    )


def _print_lines(checks: Iterable[Check]) -> list[CheckResult]:
    findings = []
    for finding in run_checks(checks):
        typer.echo(json.dumps(dataclasses.asdict(finding), ensure_ascii=False))
        findings.append(finding)
    return findings


def _print_table(checks: Iterable[Check], console: Console) -> list[CheckResult]:
    with console.status("") as status:
        findings = list(run_checks(checks, on_begin=lambda part: status.update(f"trying the {part}")))
    table = Table("part", "", "what was seen, or what to do")
    for finding in findings:
        table.add_row(
            finding.part, Text(finding.state.value, STYLES[finding.state]), Text(escape_for_terminal(finding.detail))
        )
    console.print(table)
    return findings
