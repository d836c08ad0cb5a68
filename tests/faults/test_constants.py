"""Constants that tests change by "module:NAME" are those of the module that defines them."""

import ast
import re

import pytest

from tests.support.paths import ROOT

# A value set in a module that imports the constant changes nothing for the module that defines it, and for all others.
CHANGED = re.compile(r'"((?:worker|inference|watermark|clients|config)(?:\.\w+)+):(\w+)[".]')


def changed_names() -> set[tuple[str, str]]:
    """Find module and name of everything that a test or a benchmark names so."""
    files = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return {(match[1], match[2]) for path in files for match in CHANGED.finditer(path.read_text())}


def defined_in(module: str) -> set[str]:
    """Return the names that the module's own top level assigns, or defines as class or function."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    stored = {node.id for top in tree.body for node in ast.walk(top) if isinstance(node, ast.Name) and is_stored(node)}
    return stored | {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def is_stored(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


@pytest.mark.parametrize(("module", "name"), sorted(changed_names()))
def test_a_changed_constant_is_defined_where_it_is_changed(module: str, name: str) -> None:
    assert name in defined_in(module)
