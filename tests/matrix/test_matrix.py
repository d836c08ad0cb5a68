"""`make matrix`: what is done stays done, what failed is tried again, and the table says how each step ended."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.matrix.__main__ import read_arguments, render
from tests.matrix.machines import DEMO, INSTALL, TEST, Machine, Step
from tests.matrix.roots import Run
from tests.matrix.running import MachineResult, MachineRun

SUMMARY = "==== 1 failed, 3158 passed, 2 skipped in 61.20s (0:01:01) ===="
FAILURE = "FAILED tests/config/test_logs.py::test_a_line - AssertionError"


class Here:
    """A place that is made by a command of the test and asks nobody for versions."""

    def __init__(self, folder: Path, make: str = "true") -> None:
        self._folder, self._make = folder, make
        self.num_refreshed = 0

    def make(self, run: Run) -> None:
        run(self.command(self._make))

    def refresh(self) -> None:
        self.num_refreshed += 1

    def command(self, line: str) -> list[str]:
        return ["sh", "-ec", f"cd {self._folder}; {line}"]

    def ask_python(self) -> list[str]:
        return ["echo", "3.13.5"]

    def ask_rabbitmq(self) -> list[str]:
        return ["echo", "4.0.5-6"]


Take = Callable[..., MachineResult]


@pytest.fixture
def take(tmp_path: Path) -> Take:
    def take_steps(*steps: Step, make: str = "true") -> MachineResult:
        machine = Machine("debian-13", "trixie", "", (), steps)
        return MachineRun(machine, Here(tmp_path, make), tmp_path, lambda _line: None).take_steps()

    return take_steps


def test_a_step_that_is_done_is_not_taken_again_and_one_that_failed_is(take: Take, tmp_path: Path) -> None:
    done, failed = Step("install", "echo once >> installed"), Step("test", "echo again >> tried; test -e mended")

    first = take(done, failed)
    (tmp_path / "mended").touch()
    second = take(done, failed)

    assert [step.is_done for step in first.steps] == [True, True, False]
    assert [step.is_done for step in second.steps] == [True, True, True]
    assert (tmp_path / "installed").read_text() == "once\n"
    assert (tmp_path / "tried").read_text() == "again\nagain\n"
    assert (first.is_done, second.is_done) == (False, True)
    assert (second.python, second.rabbitmq) == ("3.13.5", "4.0.5-6")


def test_a_step_that_was_broken_off_is_taken_again(take: Take, tmp_path: Path) -> None:
    (tmp_path / "demo.log").write_text("half of it")

    assert take(Step("demo", "touch drawn")).is_done

    assert (tmp_path / "drawn").exists()


@pytest.mark.parametrize(("make", "install"), [("false", "true"), ("true", "false")])
def test_nothing_is_tried_where_nothing_could_be_installed(take: Take, tmp_path: Path, make: str, install: str) -> None:
    found = take(Step(INSTALL.name, install), Step(TEST.name, "touch tried"), make=make)

    assert not found.is_done
    assert not found.steps[-1].is_done
    assert not (tmp_path / "tried").exists()


def test_steps_behind_a_failed_one_are_taken(take: Take, tmp_path: Path) -> None:
    take(Step(DEMO.name, "false"), Step(TEST.name, "touch tried"))

    assert (tmp_path / "tried").exists()


def test_the_table_has_what_pytest_counted_and_the_result_the_tests_that_failed(take: Take, tmp_path: Path) -> None:
    test = Step(TEST.name, f"echo '{FAILURE}'; echo '{SUMMARY}'; false")
    result = take(Step(INSTALL.name, "true"), test)

    console = Console(file=io.StringIO(), width=200)
    console.print(render([result]))

    table = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    assert "1 failed, 3158 passed, 2 skipped, 0.0 min" in table
    assert all(word in table for word in ("debian-13", "3.13.5", "4.0.5-6", "done, 0.0 min", "-"))
    assert result.steps[-1].failed == ("tests/config/test_logs.py::test_a_line",)
    assert FAILURE in (tmp_path / "test.log").read_text()


def test_machines_are_named_or_all_and_a_wrong_name_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_arguments([]).machines == []
    assert read_arguments(["debian-13"]).machines == ["debian-13"]
    with pytest.raises(SystemExit):
        read_arguments(["debian-1"])
    assert "debian-1: choose from debian-13, ubuntu-24.04" in capsys.readouterr().err
