"""The results on the disk: a line of JSON for every measurement as it is made, and a summary after every stage."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
SUMMARY = "summary.json"


class Recorder:
    """Appends one stage's lines. A line is one write, on the disk before the next measurement begins."""

    def __init__(self, out: Path, stage: int, started_at: float) -> None:
        """`started_at` (`time.monotonic()`) is when the command began."""
        self._path = out / RESULTS
        self._stage = stage
        self._started_at = started_at
        self._names: set[str] = set()

    def record(self, name: str, **figures: Any) -> None:
        """Write a line. ValueError where the stage has used `name` before."""
        if name in self._names:
            raise ValueError(
                f"stage {self._stage} has recorded {name!r} before: every measurement has a name of its own"
            )
        self._names.add(name)
        since_start = {"seconds_since_start": time.monotonic() - self._started_at}
        line = (
            json.dumps(_plain({"stage": self._stage, "name": name, **figures, **since_start}), allow_nan=False) + "\n"
        )
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read every whole line so far."""
    path = out / RESULTS
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines]


def drop_torn_line(out: Path) -> None:
    """Cut off a last line that a killed writer left half written; call while no stage runs."""
    path = out / RESULTS
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Replace the summary: a reader finds the old one or the new one, whole."""
    temporary = out / f"{SUMMARY}.tmp"
    with temporary.open("w") as file:
        json.dump(_plain(summary), file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(out / SUMMARY)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """Convert the value to what JSON has: non-finite numbers become words, other types become text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
