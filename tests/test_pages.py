"""The pages name files that exist, and docs/architecture.md lists the tree as it is."""

import re
from pathlib import Path

import pytest

from tests.conftest import SLOW_FILES
from tests.support.architecture import DOCUMENT, render, with_files
from tests.support.house import PACKAGES
from tests.support.paths import ROOT

README_COLUMNS = 110
PAGES = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "deploy", "examples") for path in (ROOT / folder).rglob("*.md"))]
)
FILES = [*(page for page in PAGES if page.name != "CHANGELOG.md"), ROOT / "Makefile", ROOT / "Dockerfile"]
PATH = re.compile(r"(?<![\w/.*-])(?:worker|inference|watermark|clients|config|tests|benchmarks)/[\w./*]*\w(?:/|\*)?")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text()

    missing = {path for path in PATH.findall(text) if not list(ROOT.glob(path.rstrip("/")))}
    broken = {link for link in LINK.findall(text) if page.suffix == ".md" and not (page.parent / link).exists()}

    assert (missing, broken) == (set(), set())


def test_the_slow_files_that_are_sorted_first_exist() -> None:
    missing = {name for name in SLOW_FILES if not (ROOT / "tests" / f"{name}.py").is_file()}

    assert missing == set()


def test_the_architecture_lists_every_folder_and_file_as_their_docstrings_describe_them() -> None:
    """`python -m tests.support.architecture` writes the list."""
    document = DOCUMENT.read_text()

    assert with_files(document) == document
    assert document.count("\n  - `") >= sum(
        path.name != "__init__.py" for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    )


def test_every_line_of_the_list_has_a_description() -> None:
    assert [line for line in render().splitlines() if line.endswith(("`", "** "))] == []


def test_no_line_of_the_readme_is_longer_than_110_columns() -> None:
    long = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > README_COLUMNS]

    assert long == []
