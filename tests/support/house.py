"""`python -m tests.support.house [TREE]`: measure the shape of the source and the voice of its docstrings."""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

PACKAGES = ("worker", "inference", "watermark", "clients", "config")
MAX_FUNCTION_LINES, LONG_FILE_LINES, MAX_FILE_LINES = 50, 250, 300
SUPPRESSION = re.compile(r"# (?:noqa|type: ignore)")
BROAD = {"Exception", "BaseException"}
# Pronouns for persons, and verbs of persons, where the field has a noun or a verb of its own.
EVERYDAY_WORDS = """
somebody nobody anybody everybody whoever meanwhile tell tells told stand stands lie lies wear wears
learn learns know knows ask asks want wants hear hears
"""
# A docstring that begins with one of these describes something. So does one with a verb in the third person.
DESCRIPTIVE_WORDS = """
a an the this that these those it its they their he she we our you your one each every all some any no none
what which who whom whose where when whether why how does is are has
in on at by of for from with as to so if
"""


class Function(NamedTuple):
    """One `def`: where it is, how long it is, and whether it is private and named once in its file."""

    place: str
    num_lines: int
    has_one_caller: bool


@dataclass
class Survey:
    """What was counted in a tree."""

    num_lines: int = 0
    file_lines: dict[str, int] = field(default_factory=dict)
    modules: Counter[str] = field(default_factory=Counter)
    functions: list[Function] = field(default_factory=list)
    num_suppressions: int = 0
    num_broad_excepts: int = 0
    num_words: int = 0
    everyday: Counter[str] = field(default_factory=Counter)
    num_function_docstrings: int = 0
    descriptive: list[str] = field(default_factory=list)


class Figure(NamedTuple):
    """A row of the table: `lowest <= value <= highest` is the goal."""

    name: str
    value: float
    highest: float
    lowest: float = 0

    @property
    def is_met(self) -> bool:
        return self.lowest <= self.value <= self.highest

    @property
    def goal(self) -> str:
        if self.lowest:
            return f"{self.lowest:g} to {self.highest:g}"
        return f"<= {self.highest:g}" if self.highest else "0"


def survey(tree: Path) -> Survey:
    """Count in every Python file of the packages below `tree`."""
    found = Survey()
    for package in PACKAGES:
        for path in sorted((tree / package).rglob("*.py")):
            _add_file(found, path, path.relative_to(tree).as_posix())
    return found


def _add_file(found: Survey, path: Path, name: str) -> None:
    text = path.read_text()
    module = ast.parse(text, name)
    lines = len(text.splitlines())
    found.num_lines += lines
    found.file_lines[name] = lines
    found.modules[str(Path(name).parent)] += path.name != "__init__.py"
    found.num_suppressions += _num_suppressions(text)
    used = _names_used(module)
    for node in ast.walk(module):
        if isinstance(node, ast.ExceptHandler):
            found.num_broad_excepts += _is_broad(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.functions.append(_function(node, name, used))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _add_docstring(found, node, name)


def _num_suppressions(text: str) -> int:
    comments = (
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    )
    return sum(len(SUPPRESSION.findall(comment)) for comment in comments)


def _names_used(module: ast.Module) -> Counter[str]:
    nodes = list(ast.walk(module))
    return Counter(node.id for node in nodes if isinstance(node, ast.Name)) + Counter(
        node.attr for node in nodes if isinstance(node, ast.Attribute)
    )


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(one) in BROAD for one in caught)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, used: Counter[str]) -> Function:
    is_private = node.name.startswith("_") and not node.name.startswith("__")
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return Function(f"{name}:{node.lineno} {node.name}", lines, is_private and used[node.name] == 1)


def _add_docstring(
    found: Survey, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return
    words = re.findall(r"[a-z]+", docstring.lower())
    found.num_words += len(words)
    found.everyday.update(word for word in words if word in EVERYDAY_WORDS.split())
    # A property is named by a noun, and the docstring of `__init__` is about its parameters.
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node) and node.name != "__init__":
        found.num_function_docstrings += 1
        if not is_imperative(docstring):
            found.descriptive.append(f"{name}:{node.lineno} {node.name}: {docstring.splitlines()[0]}")


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(one).rpartition(".")[2] in {"property", "cached_property"} for one in node.decorator_list)


def is_imperative(docstring: str) -> bool:
    """Guess it from the first word: no article, pronoun or question word, and no verb in -s ("Pass" is one in -ss)."""
    first = re.match(r"[A-Za-z]*", docstring.strip())
    word = first[0].lower() if first else ""
    return bool(word) and word not in DESCRIPTIVE_WORDS.split() and not re.search(r"[^s]s$", word)


def figures(found: Survey) -> list[Figure]:
    """Compute the rows of the table, each with its goal."""
    lengths = sorted(function.num_lines for function in found.functions) or [0]
    one_caller = sum(function.has_one_caller for function in found.functions)
    thousand_lines = found.num_lines / 1000 or 1
    words = found.num_words / 1000 or 1
    return [
        Figure("modules in the largest folder", max(found.modules.values(), default=0), 13),
        Figure("function length, median", lengths[len(lengths) // 2], 8, lowest=7),
        Figure("function length, 90th percentile", lengths[int(len(lengths) * 0.9)], 20),
        Figure(f"functions over {MAX_FUNCTION_LINES} lines", _num_over(lengths, MAX_FUNCTION_LINES), 0),
        Figure("private functions with one caller, %", round(100 * one_caller / len(lengths), 1), 18),
        Figure(f"files over {MAX_FILE_LINES} lines", _num_over(found.file_lines.values(), MAX_FILE_LINES), 0),
        Figure(f"files over {LONG_FILE_LINES} lines", _num_over(found.file_lines.values(), LONG_FILE_LINES), 5),
        Figure("suppressions per 1000 lines", round(found.num_suppressions / thousand_lines, 2), 3),
        Figure("broad excepts per 1000 lines", round(found.num_broad_excepts / thousand_lines, 2), 1.2),
        Figure("everyday words per 1000 of docstrings", round(found.everyday.total() / words, 2), 1),
        Figure("docstrings of functions without an imperative", len(found.descriptive), 0),
    ]


def _num_over(sizes: Iterable[int], limit: int) -> int:
    return sum(size > limit for size in sizes)


def render(found: Survey) -> str:
    """Write the table; its last line is JSON."""
    rows = figures(found)
    sizes = f"{len(found.file_lines)} files, {found.num_lines} lines, {len(found.functions)} functions"
    lines = [f"{row.name:46}{row.value:>8g}   {row.goal:8}{'' if row.is_met else ' missed'}".rstrip() for row in rows]
    return "\n".join([sizes, f"{'':46}{'here':>8}   goal", *lines, json.dumps({row.name: row.value for row in rows})])


def offenders(found: Survey) -> list[str]:
    """List what misses a goal or counts against one, a line each."""
    return [
        *(f"{lines} lines: {name}" for name, lines in found.file_lines.items() if lines > LONG_FILE_LINES),
        *(f"{one.num_lines} lines: {one.place}" for one in found.functions if one.num_lines > MAX_FUNCTION_LINES),
        *(f"one caller: {one.place} ({one.num_lines} lines)" for one in found.functions if one.has_one_caller),
        *(f"no imperative: {one}" for one in found.descriptive),
        "everyday: " + ", ".join(f"{word} {number}" for word, number in found.everyday.most_common()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, nargs="?", default=ROOT, help="another checkout")
    parser.add_argument("--list", action="store_true", help="name what counts against the goals")
    chosen = parser.parse_args(arguments)

    found = survey(chosen.tree)
    if not found.file_lines:
        parser.error(f"{chosen.tree} has none of the packages {', '.join(PACKAGES)}")
    if chosen.list:
        print(*offenders(found), sep="\n")
    print(render(found))
    return 0 if all(row.is_met for row in figures(found)) else 1


if __name__ == "__main__":
    sys.exit(main())
