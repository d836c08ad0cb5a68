"""RunPod's files: what the Hub is told fits the worker, and the handler runs one to its end."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.settings import SECTIONS
from tests.support.paths import ROOT

FOLDER = ROOT / ".runpod"
FIELDS = {
    str(field.validation_alias): field for section in SECTIONS.values() for field in section.model_fields.values()
}
# Given by the URL, or by what the store is.
ELSEWHERE = {"RABBITMQ_HOST", "RABBITMQ_USER", "RABBITMQ_PASS"}


def asked() -> dict[str, Any]:
    config = json.loads((FOLDER / "hub.json").read_text())["config"]
    return {one["key"]: one["input"] for one in config["env"]}


def test_hub_asks_for_every_required_setting_and_for_no_unknown_one() -> None:
    required = {name for name, field in FIELDS.items() if field.is_required()}

    assert asked().keys() >= required - ELSEWHERE
    assert asked().keys() <= FIELDS.keys() | {"HF_TOKEN", "HF_HOME"}


def test_defaults_that_the_hub_shows_are_the_worker_s() -> None:
    shown = {key: given["default"] for key, given in asked().items() if given["default"] != "" and key in FIELDS}

    assert shown == {key: FIELDS[key].default for key in shown}


def test_linter_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")

    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(("exit_code", "answer"), [(0, {"exit_code": 0}), (3, {"error": "3"})])
def test_handler_runs_a_worker_until_it_is_idle_and_tells_how_it_ended(
    exit_code: int, answer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "darkroom"
    command.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/given\nexit {exit_code}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    handler = runpy.run_path(str(FOLDER / "handler.py"))["handler"]

    made = handler({"input": {"exit_when_idle": 90}})

    assert (tmp_path / "given").read_text() == "run --exit-when-idle 90\n"
    assert made.keys() == answer.keys()
    assert str(exit_code) in str(made)


def test_handler_answers_the_hub_s_test_without_a_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    handler = runpy.run_path(str(FOLDER / "handler.py"))["handler"]
    [test] = json.loads((FOLDER / "tests.json").read_text())["tests"]

    assert handler(test)["version"].startswith("darkroom ")
