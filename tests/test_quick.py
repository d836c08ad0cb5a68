"""What `pytest --quick` reads, and what it leaves out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support.paths import ROOT
from tests.support.quick import is_heavy, starts_a_program, starts_a_server

TESTS = ROOT / "tests"


@pytest.mark.parametrize("path", sorted((TESTS / "live").glob("test_*.py")), ids=lambda path: path.stem)
def test_no_whole_worker_is_quick(path: Path) -> None:
    assert is_heavy(path)


@pytest.mark.parametrize("name", ["inference/models/test_families", "worker/monitoring/test_prometheus"])
def test_a_model_or_another_program_is_not_quick(name: str) -> None:
    assert is_heavy(TESTS / f"{name}.py")


@pytest.mark.parametrize("name", ["test_architecture", "worker/messages/test_decoder", "worker/results/test_ledger"])
def test_a_file_is_quick_whose_imports_are_light_whatever_fixtures_it_names(name: str) -> None:
    assert not is_heavy(TESTS / f"{name}.py")


def test_an_import_inside_of_a_function_counts_for_a_test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.quick.TESTS", tmp_path)
    late, typed = tmp_path / "test_late.py", tmp_path / "test_typed.py"
    late.write_text("def test_late():\n    from torch import nn\n")
    typed.write_text("if TYPE_CHECKING:\n    from torch import nn\n")

    assert (is_heavy(late), is_heavy(typed)) == (True, False)


@pytest.mark.parametrize(("fixtures", "expected"), [(["tmp_path"], False), (["tmp_path", "s3_server"], True)])
def test_a_test_below_a_servers_fixture_is_not_quick(fixtures: list[str], expected: bool) -> None:
    item = cast(Any, SimpleNamespace(fixturenames=fixtures))

    assert starts_a_server(item) == expected


TEST_FILE = """
import subprocess
import pytest

COMMAND = ["true"]

@pytest.fixture
def ended():
    return run()

def run():
    return subprocess.run(COMMAND)

def test_direct():
    run()

def test_by_fixture(ended):
    assert ended

def test_neither():
    assert COMMAND
"""


@pytest.mark.parametrize(
    ("name", "fixtures", "expected"),
    [("test_direct", [], True), ("test_by_fixture[a::b]", ["ended"], True), ("test_neither", [], False)],
)
def test_a_test_that_starts_a_program_is_not_quick(
    name: str, fixtures: list[str], expected: bool, tmp_path: Path
) -> None:
    path = tmp_path / "test_programs.py"
    path.write_text(TEST_FILE)
    item = cast(Any, SimpleNamespace(path=path, nodeid=f"test_programs.py::{name}", fixturenames=fixtures))

    assert starts_a_program(item) == expected


def test_a_command_that_imports_torch_when_called_is_not_quick() -> None:
    path = TESTS / "worker" / "cli" / "test_options.py"
    item = cast(Any, SimpleNamespace(path=path, nodeid="::app", fixturenames=[]))

    assert not is_heavy(path)
    assert starts_a_program(item)


def test_a_test_against_a_server_of_its_own_process_is_not_quick(tmp_path: Path) -> None:
    path = tmp_path / "test_servers.py"
    path.write_text(
        "from tests.support.servers.clients_servers import SilentServer\n\ndef test_it():\n    SilentServer()\n"
    )
    item = cast(Any, SimpleNamespace(path=path, nodeid="test_servers.py::test_it", fixturenames=[]))

    assert starts_a_program(item)
