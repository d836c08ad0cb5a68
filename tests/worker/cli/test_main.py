"""What every command line has: a version, help, completion; and `darkroom cancel`, without a broker."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.servers.clients_servers import refused_url
from worker.cli.cancel import InvalidId, orders_of
from worker.cli.main import app
from worker.version import darkroom_version

TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"


def typed(*arguments: str, **env: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", **env})
    return done.exit_code, done.output


def test_the_version_is_that_of_the_package() -> None:
    assert typed("--version") == (0, f"darkroom {darkroom_version()}\n")


@pytest.mark.parametrize("command", [[], ["run"], ["generate"], ["cancel"], ["dead"], ["dead", "list"]])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_a_short_and_a_long_option_for_help(command: list[str], option: str) -> None:
    code, said = typed(*command, option)

    assert code == 0
    assert "Usage:" in said


def test_the_package_is_run_as_the_command_is() -> None:
    command = [sys.executable, "-m", "worker", "--version"]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert ended.stdout == f"darkroom {darkroom_version()}\n"


def asked_of_a_process(**variables: str) -> str:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    darkroom = str(Path(sys.executable).parent / "darkroom")
    return subprocess.run(
        [darkroom], env=env | variables, capture_output=True, text=True, timeout=120, check=False
    ).stdout


def asked_here(**variables: str) -> str:
    return CliRunner().invoke(app, [], env=variables, prog_name="darkroom").stdout


@pytest.mark.parametrize(("shell", "asked"), [("bash", asked_of_a_process), ("zsh", asked_here), ("fish", asked_here)])
def test_each_shell_is_given_a_script_and_completions(shell: str, asked: Callable[..., str]) -> None:
    script = asked_here(_DARKROOM_COMPLETE=f"source_{shell}")
    typed_so_far = {"COMP_WORDS": "darkroom can", "COMP_CWORD": "1"} if shell == "bash" else {}
    others = {"_TYPER_COMPLETE_ARGS": "darkroom can", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    completed = asked(_DARKROOM_COMPLETE=f"complete_{shell}", **typed_so_far, **others)

    assert "_DARKROOM_COMPLETE" in script
    assert "cancel" in completed
    assert "check" not in completed


@pytest.mark.parametrize(
    ("text", "options", "orders"),
    [
        ("456", {}, [{"generation_id": 456}]),
        ("gen_a.7", {}, [{"generation_id": "gen_a.7"}]),
        ("0456", {}, [{"generation_id": "0456"}]),
        ("9223372036854775808", {}, [{"generation_id": "9223372036854775808"}]),
        # A UUID may be either's.
        (TASK_ID, {}, [{"task_id": TASK_ID}, {"generation_id": TASK_ID}]),
        (TASK_ID.upper(), {"is_task": True}, [{"task_id": TASK_ID}]),
        (TASK_ID.upper(), {"is_generation": True}, [{"generation_id": TASK_ID.upper()}]),
        ("456", {"is_generation": True}, [{"generation_id": 456}]),
    ],
)
def test_an_id_is_a_task_s_or_a_generation_s_by_its_form(
    text: str, options: dict[str, bool], orders: list[dict[str, Any]]
) -> None:
    assert orders_of(text, **options) == orders


@pytest.mark.parametrize(
    ("text", "options"), [("", {}), ("a b", {}), ("a/b", {}), ("x" * 129, {}), ("456", {"is_task": True})]
)
def test_invalid_id_is_refused(text: str, options: dict[str, bool]) -> None:
    with pytest.raises(InvalidId):
        orders_of(text, **options)


def test_cancel_without_a_broker_names_its_address() -> None:
    host, _, port = refused_url().removeprefix("http://").partition(":")

    code, said = typed("cancel", "456", RABBITMQ_HOST=host, RABBITMQ_PORT=port.rstrip("/"))

    assert code == 1
    assert "RABBITMQ_HOST and RABBITMQ_PORT" in said
    assert host in said


def test_a_job_is_one_of_a_task_or_of_a_generation() -> None:
    assert typed("cancel", "456", "--task", "--generation")[0] == 2
