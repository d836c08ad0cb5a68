"""What importing our files brings, read from the source."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

OURS = {"benchmarks", "config", "inference", "tests", "worker", "clients", "watermark", "examples"}


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Return the dotted names that importing a module imports at once, without those in functions and for type
    checkers.
    """
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ClassDef | ast.With | ast.Try):
            yield from imported_at_once(node.body)


@cache
def file_of(name: str) -> Path | None:
    """Find the file of our module `name`, or of the module that the name is in."""
    path = ROOT / name.replace(".", "/")
    found = [one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()]
    return found[0] if found else None


def packages_of(files: list[Path]) -> set[str]:
    """Return the third-party packages that importing these files imports, directly or not."""
    packages: set[str] = set()
    seen: set[Path] = set()
    while files:
        path = files.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported_at_once(ast.parse(path.read_text()).body):
            if name.partition(".")[0] in OURS:
                files += [one for one in (file_of(name), file_of(name.rpartition(".")[0])) if one]
            else:
                packages.add(name.partition(".")[0])
    return packages - set(sys.stdlib_module_names)
