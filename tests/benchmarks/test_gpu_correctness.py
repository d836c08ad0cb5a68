"""The stage that runs the tests: what it records of each, and its verdict."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.correctness import SECONDS_FOR_A_TEST, TestResults
from benchmarks.gpu.stage import Context

TESTS = """
import pytest

def test_right(record_property):
    record_property("psnr_db", 50.0)

def test_wrong():
    assert 1 == 2, "one is not two"

def test_elsewhere():
    pytest.skip("needs a second GPU")

@pytest.fixture
def broken():
    raise RuntimeError("no device")

def test_without_its_fixture(broken):
    pass
"""


def run_tests(
    monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, seconds_left: float = 1000.0
) -> tuple[TestResults, dict[str, dict[str, Any]]]:
    """Run a file of tests in a session of its own; what was recorded of them, by the tests' names."""
    # pytest imports each name once a process.
    path = folder / f"test_{folder.name}.py"
    path.write_text(text)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    recorded: dict[str, dict[str, Any]] = {}

    def record(name: str, **figures: Any) -> None:
        recorded[name.rpartition("::")[2]] = figures

    deadline = time.monotonic() + seconds_left
    results = TestResults(Context(torch.device("cpu"), "full", folder, deadline, record))
    options = [
        "--quiet",
        "-s",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        str(folder),
    ]
    pytest.main([*options, str(path)], plugins=[results])
    return results, recorded


def test_each_test_is_recorded_with_its_outcome_its_properties_and_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, recorded = run_tests(monkeypatch, tmp_path, TESTS)

    assert {name: figures["outcome"] for name, figures in recorded.items()} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_elsewhere": "skipped",
        "test_without_its_fixture": "failed",
    }
    assert recorded["test_right"]["psnr_db"] == 50.0
    assert "one is not two" in recorded["test_wrong"]["error"]
    assert "no device" in recorded["test_without_its_fixture"]["error"]
    assert "second GPU" in recorded["test_elsewhere"]["skipped"]
    assert results.counts == {"passed": 1, "failed": 2, "skipped": 1, "left_out": 0}


def test_no_test_is_begun_that_the_time_box_would_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, recorded = run_tests(monkeypatch, tmp_path, TESTS, seconds_left=SECONDS_FOR_A_TEST / 2)

    assert list(recorded) == ["test_right"]
    assert results.counts == {"passed": 1, "failed": 0, "skipped": 0, "left_out": 3}


def test_a_file_that_cannot_be_read_is_a_failure_with_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results, recorded = run_tests(monkeypatch, tmp_path, "import a_package_that_is_not_there\n")

    (figures,) = recorded.values()
    assert "a_package_that_is_not_there" in figures["error"]
    assert results.counts["passed"] == 0
