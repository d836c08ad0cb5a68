"""Stage 1: the tests that `pytest -m gpu` takes, on the device: a line for each as it ends, and a verdict.

In this process, which has torch and diffusers loaded: another would import them again.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stage import Context

ROOT = Path(__file__).parent.parent.parent
# What blocks most comes first, should the time box end before the tests do. The others follow.
ORDER = ("test_parity", "test_half_precision", "test_families", "test_kinds", "test_control")
# Memory that ends and a device assert are stage 5's, on a model of full size.
ALL = ("tests", "--ignore=tests/inference/device/test_real_device.py")
# A rehearsal takes one engine and one test of its parts.
REHEARSED = ("tests/inference/models/test_half_precision.py", "-k", "sd and bfloat16 and not sdxl")
# The last test that is begun must end, and the verdict be written, within the box.
SECONDS_FOR_A_TEST = 6.0
MAX_ERROR_CHARACTERS = 500
OPTIONS = (
    "-m",
    "gpu",
    "--quiet",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "--continue-on-collection-errors",
    "--rootdir",
    str(ROOT),
)


def run(context: Context) -> None:
    """Run the tests on the device. A verdict without a passed test keeps the stages from measuring speed."""
    assert "tests.support.images.parity" not in sys.modules, "it has read DARKROOM_TEST_DEVICE already"
    os.environ["DARKROOM_TEST_DEVICE"] = context.device.type
    # On a GPU those are quick that `make test` leaves out.
    os.environ["LONG"] = "1"
    # Whatever else is installed beside pytest takes time, and may take the stage's alarm.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    results = TestResults(context)
    code = pytest.main([*OPTIONS, *(REHEARSED if context.is_tiny else ALL)], plugins=[results])
    context.record("verdict", **results.counts, exit_code=int(code))


class TestResults:
    """A plugin that records each test as it ends, and ends the session while there is time left for the verdict."""

    __test__ = False

    def __init__(self, context: Context) -> None:
        self._context = context
        self._phases: list[pytest.TestReport] = []
        self._num_chosen = 0
        self._outcomes: list[str] = []
        self._session: pytest.Session | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Tests by how they ended; `left_out` are those that the time did not suffice for."""
        counts = {outcome: self._outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
        return {**counts, "left_out": self._num_chosen - len(self._outcomes)}

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        rank = {name: number for number, name in enumerate(ORDER)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._num_chosen = len(session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._context.record(f"collecting {report.nodeid}", error=_short(report.longreprtext))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._phases.append(report)
        if report.when == "teardown":
            self._end_test()

    def _end_test(self) -> None:
        phases, self._phases = self._phases, []
        failed = [phase for phase in phases if phase.failed]
        skipped = [phase for phase in phases if phase.skipped]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        self._outcomes.append(outcome)
        figures: dict[str, Any] = {"outcome": outcome, "seconds": sum(phase.duration for phase in phases)}
        figures |= dict(phases[-1].user_properties)
        if failed:
            figures["error"] = _short(failed[0].longreprtext)
        elif skipped:
            figures["skipped"] = _short(skipped[0].longreprtext)
        self._context.record(phases[0].nodeid, **figures)
        if not self._context.is_tiny and self._context.seconds_left() < SECONDS_FOR_A_TEST:
            assert self._session is not None, "a session has started"
            self._session.shouldstop = "the time box ends"


def _short(text: str) -> str:
    """Shorten a report to a line: the error as pytest shows it, and the place."""
    lines = text.strip().splitlines()
    shown = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return " ".join([*shown[:1], *lines[-1:]])[:MAX_ERROR_CHARACTERS]
