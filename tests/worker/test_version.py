"""The version is written in pyproject.toml; what repeats it follows."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from tests.support.paths import ROOT
from worker.version import DISTRIBUTION, darkroom_version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_that_of_the_distribution() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert darkroom_version() == PROJECT["version"]


def test_version_of_a_checkout_that_is_not_installed_is_read_from_its_project(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    shutil.copy(ROOT / "worker" / "version.py", tmp_path / "worker")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    code = "from worker.version import darkroom_version; print(darkroom_version())"

    # -S: without site-packages nothing is installed.
    ended = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )

    assert ended.stdout == "1.2.3\n"


def test_contract_carries_the_version_that_comes_next() -> None:
    contract = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())

    assert re.sub(r"\.dev\d+$", "", PROJECT["version"]) == contract["info"]["version"]


def test_changes_that_are_not_released_are_listed_above_those_that_are() -> None:
    _, unreleased, first = re.split(r"^## .*\n", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)

    assert unreleased.strip().startswith("- ")
    # What is added at the end of the file is added to a version that is out.
    assert first.rstrip().endswith("private real servers; a demo model that draws on two CPU cores.")
