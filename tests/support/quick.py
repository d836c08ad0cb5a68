"""What `pytest --quick` leaves out: tests with a server, files that load a model library or start programs."""

import ast
import re
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
TESTS, EXAMPLES = ROOT / "tests", ROOT / "examples"
# Servers inside the test's own process: what is tested against them are deadlines, which take their time.
SERVERS = TESTS / "support" / "servers"
# Most files have no import inside a block, and need no walk through their whole tree.
INDENTED_IMPORT = re.compile(r"^ +from ", re.MULTILINE)


class _Imports(NamedTuple):
    libraries: frozenset[str]
    ours: frozenset[Path]


@cache
def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


@cache
def _imports(path: Path, *, in_functions: bool) -> _Imports:
    """Return what importing the file imports and, on request, what its functions import when called."""
    body = _body(path)
    names = set(imported_at_once(body))
    if in_functions and INDENTED_IMPORT.search(path.read_text()):
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
    """Return the file and all of ours that calling its functions imports."""
    reached, new = set[Path](), {path}
    while new:
        reached |= new
        new = {
            imported
            for one in new
            for imported in _imports(one, in_functions=one == path or one.is_relative_to(TESTS)).ours
        } - reached
    return reached


@cache
def _libraries(path: Path) -> frozenset[str]:
    """Return the libraries that calling the file's functions imports."""
    return frozenset(
        library
        for one in _reached(path)
        for library in _imports(one, in_functions=one == path or one.is_relative_to(TESTS)).libraries
    )


def is_heavy(path: Path) -> bool:
    """Return whether a file loads a heavy library, or its helpers start programs."""
    if _libraries(path) & HEAVY_LIBRARIES:
        return True
    helpers = {one for one in _reached(path) if one.is_relative_to(TESTS) or one.is_relative_to(EXAMPLES)} - {path}
    return any(_imports(one, in_functions=True).libraries & STARTS_PROGRAMS for one in helpers)


def starts_a_server(item: pytest.Item) -> bool:
    """Return whether one of the fixtures below the test is a server's."""
    return not SERVER_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def starts_a_program(item: pytest.Item) -> bool:
    """Return whether the test or what it names in its file starts a program or server, or imports a heavy library."""
    names = {item.nodeid.split("::")[1].partition("[")[0], *getattr(item, "fixturenames", ())}
    return not names.isdisjoint(_heavy_names(item.path))


@cache
def _heavy_names(path: Path) -> frozenset[str]:
    """Return the file's imports that are heavy, and its definitions that use one of them, directly or not."""
    uses, heavy, new = _names_used(path), set[str](), set(_heavy_imports(path))
    while new:
        heavy |= new
        new = {name for name, used in uses.items() if used & heavy} - heavy
    return frozenset(heavy)


def _names_used(path: Path) -> dict[str, set[str]]:
    """Return, for each top-level definition of the file, the names in it."""
    used: dict[str, set[str]] = {}
    for node in _body(path):
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            used[node.name] = names | {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            used |= {target.id: names for target in targets if isinstance(target, ast.Name)}
    return used


def _heavy_imports(path: Path) -> frozenset[str]:
    """Return the names that the file imports and that start programs or servers, or import a heavy library late."""
    heavy = set(STARTS_PROGRAMS)
    for node in _body(path):
        if isinstance(node, ast.ImportFrom):
            module = file_of(str(node.module))
            if module and (module.is_relative_to(SERVERS) or _libraries(module) & HEAVY_LIBRARIES):
                heavy |= {alias.asname or alias.name for alias in node.names}
    return frozenset(heavy)
