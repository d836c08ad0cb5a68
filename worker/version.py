"""The version of the distribution that is installed, or of a checkout that is run without being installed."""

import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "darkroom-worker"
PROJECT_FILE = Path(__file__).parents[1] / "pyproject.toml"


@cache
def darkroom_version() -> str:
    """Return the version, which is written in pyproject.toml alone."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return str(tomllib.loads(PROJECT_FILE.read_text())["project"]["version"])
