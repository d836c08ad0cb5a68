"""`python -m tests.mutations [ROW …]`: take each row's mechanism out of a copy of the code and see its tests fail."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.mutations.row import Mutation, Row
from tests.mutations.rows import ROWS
from tests.support.checkout import copy_checkout


class RowResult(NamedTuple):
    """What became of a row without its mechanism."""

    row: Row
    failed: tuple[str, ...]
    missed: tuple[str, ...]
    seconds: float

    @property
    def is_caught(self) -> bool:
        return not self.missed


def apply(mutation: Mutation, root: Path) -> None:
    """Apply the mutation. Raises `ValueError` where the text to take out is not there exactly once."""
    path = root / mutation.path
    text = path.read_text()
    if (found := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.path} holds {found} times, not once: {mutation.old!r}")
    path.write_text(text.replace(mutation.old, mutation.new))


def check(row: Row) -> RowResult:
    """Run the row's tests without its mechanism."""
    started_at = time.monotonic()
    # A worker that a failed test left behind may still write there.
    with tempfile.TemporaryDirectory(prefix=f"darkroom-{row.name}-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        copy_checkout(folder)
        for mutation in row.without:
            apply(mutation, folder)
        report = folder / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder / 'tmp'}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *row.tests],
            cwd=folder,
            env=os.environ | {"LONG": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            raise RuntimeError(f"{row.name}: the tests did not run\n{done.stdout}{done.stderr}")
        failed = failures(report)
    missed = tuple(test for test in row.tests if not any(is_of(test, name) for name in failed))
    return RowResult(row, tuple(sorted(failed)), missed, time.monotonic() - started_at)


def failures(report: Path) -> set[str]:
    """Return the ids of the tests that failed; one that could not be set up has shown nothing."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {
        f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None
    }


def is_of(test: str, name: str) -> bool:
    """Return whether the failed `name` is `test` or one of its parameters."""
    return name == test or name.startswith(f"{test}[")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as A1; all of them where none is named")
    parser.add_argument("--jobs", type=int, default=2, help="rows looked at side by side")
    options = parser.parse_args(arguments)
    known = {row.name: row for row in ROWS}
    if unknown := sorted(set(options.rows) - set(known)):
        parser.error(f"no such row: {', '.join(unknown)}; known are {', '.join(known)}")

    chosen = [row for row in ROWS if row.without and (not options.rows or row.name in options.rows)]
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(check, chosen):
            results.append(result)
            word = "caught" if result.is_caught else "NOT SEEN by " + ", ".join(result.missed)
            print(f"{result.row.name:<5} {result.seconds:5.0f} s  {word}", flush=True)
    missed = [result.row.name for result in results if not result.is_caught]
    print(f"{len(results) - len(missed)} of {len(results)} rows have tests that fail without their mechanism")
    print(json.dumps({"rows": len(ROWS), "checked": len(results), "caught": len(results) - len(missed)}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
