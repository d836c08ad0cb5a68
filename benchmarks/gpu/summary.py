"""What came of it all: `summary.json` for machines, a table for people."""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import END, FAILURE, START
from benchmarks.gpu.frame import Plan, StageEnd
from benchmarks.gpu.records import read_records
from benchmarks.gpu.stages import STAGES, Stage

ROOT = Path(__file__).parent.parent.parent
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "numpy", "triton")
FRAME_FIGURES = ("stage", "name", "seconds_since_start")
TABLE_WIDTH = 200


def describe() -> dict[str, Any]:
    """Return the constants of a run: versions, the machine, the commit."""
    return {
        "benchmark": "gpu",
        "began_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def summarise(plan: Plan, description: Mapping[str, Any], ends: Mapping[int, StageEnd]) -> dict[str, Any]:
    """Summarise the stages that have ended; the others are "waiting"."""
    records = read_records(plan.out)
    devices = [one["device"] for one in records if one["name"] == START]
    return {
        **description,
        "device": devices[0] if devices else None,
        "size": plan.size,
        "budget_seconds": plan.budget,
        "seconds": time.monotonic() - plan.started_at,
        "stages": [_stage(stage, ends.get(stage.number, StageEnd("waiting")), records) for stage in STAGES],
    }


def print_tables(summary: Mapping[str, Any]) -> None:
    """Print every figure of every stage, and how the stages ended."""
    for stage in summary["stages"]:
        rows = [(name, _short(figures)) for name, figures in stage["figures"].items()]
        if rows:
            _print_table(f"{stage['number']} {stage['name']}", ("measurement", "figures"), rows)
    endings = [_ending(stage) for stage in summary["stages"]]
    _print_table(f"{summary['device']}", ("stage", "state", "seconds", "measurements", "failed", "reason"), endings)


def _stage(stage: Stage, end: StageEnd, records: list[dict[str, Any]]) -> dict[str, Any]:
    own = [one for one in records if one["stage"] == stage.number and one["name"] not in (START, FAILURE, END)]
    figures = {one["name"]: {key: one[key] for key in one if key not in FRAME_FIGURES} for one in own}
    num_failed = sum("error" in one for one in own)
    reasons = [end.reason, f"failed measurements: {num_failed}" if num_failed else ""]
    return {
        "number": stage.number,
        "name": stage.name,
        "state": end.state,
        "reason": "; ".join(filter(None, reasons)),
        "seconds": end.seconds,
        "failed_measurements": num_failed,
        "skipped_measurements": sum("skipped" in one for one in own),
        "figures": figures,
    }


def _ending(stage: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (str(len(stage["figures"])), str(stage["failed_measurements"]))
    name = f"{stage['number']} {stage['name']}"
    return (name, stage["state"], f"{stage['seconds']:.1f}", *counts, stage["reason"])


def _print_table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print by rich where it is installed, else in columns."""
    if find_spec("rich"):
        from rich.console import Console  # noqa: PLC0415 - not on every machine
        from rich.table import Table  # noqa: PLC0415

        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(one.replace("[", r"\[") for one in row))
        Console(width=TABLE_WIDTH).print(table)
        return
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(title)
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _short(figures: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in figures.items() if name not in ("traceback", "measured_in_seconds")}
    return ", ".join(f"{name} {_number(value)}" for name, value in shown.items())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_number(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_number, value)) + "]"
    return str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of a checkout, "-dirty" where it has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
