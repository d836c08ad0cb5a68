"""What `pytest --quick` leaves out: tests below a server, files that load a model library or start programs."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.imports import OURS, file_of, imported_at_once
from tests.support.paths import ROOT

# Importing one of these takes seconds; tests that need one generate images, or drive a browser or a backend.
HEAVY_LIBRARIES = {"torch", "diffusers", "transformers", "onnxruntime", "rembg", "django", "playwright"}
SERVER_FIXTURES = {"rabbitmq", "s3_server"}
# What the private servers, workers and other programs are started with.
STARTS_PROGRAMS = {"subprocess", "multiprocessing"}
TESTS = ROOT / "tests"


class _Imports(NamedTuple):
    libraries: frozenset[str]
    ours: frozenset[Path]


@cache
def _imports(path: Path) -> _Imports:
    """Return what importing the file imports; for tests and their helpers also what their functions import."""
    body = ast.parse(path.read_text()).body
    names = set(imported_at_once(body))
    if path.is_relative_to(TESTS):
        names |= {
            f"{node.module}.{alias.name}"
            for top in body
            if not (isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING")
            for node in ast.walk(top)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
    ours = {name for name in names if name.partition(".")[0] in OURS}
    files = {one for name in ours for one in (file_of(name), file_of(name.rpartition(".")[0])) if one}
    return _Imports(frozenset(name.partition(".")[0] for name in names - ours), frozenset(files))


def _reached(path: Path) -> set[Path]:
    """Return the file and all of ours that importing it imports."""
    reached, new = set[Path](), {path}
    while new:
        reached |= new
        new = {imported for one in new for imported in _imports(one).ours} - reached
    return reached


def is_heavy(path: Path) -> bool:
    """Return whether a file loads a heavy library, or whose helpers start programs."""
    reached = _reached(path)
    if any(_imports(one).libraries & HEAVY_LIBRARIES for one in reached):
        return True
    helpers = {one for one in reached if one.is_relative_to(TESTS) or one.is_relative_to(ROOT / "examples")} - {path}
    return any(_imports(one).libraries & STARTS_PROGRAMS for one in helpers)


def starts_a_server(item: pytest.Item) -> bool:
    """Return whether one of the fixtures below the test is a server's."""
    return not SERVER_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
