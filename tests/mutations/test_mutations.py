"""The fault matrix's rows name tests and mechanisms that exist. Taking them out, one by one: `make mutations`."""

import ast
from pathlib import Path

import pytest

from tests.mutations.__main__ import apply, failures, is_of
from tests.mutations.matrix import DOCUMENT, with_matrix
from tests.mutations.row import Mutation, Row
from tests.mutations.rows import ROWS
from tests.support.paths import ROOT

CORE = 40  # rows that must be held by tests


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_names_tests_that_exist_and_mechanisms_that_can_be_taken_out(row: Row) -> None:
    for test in (*row.tests, *row.also):
        path, _, name = test.partition("::")
        functions = [node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")]
        assert name.partition("[")[0] in functions
    for path, old, new in row.without:
        text = (ROOT / path).read_text()
        assert text.count(old) == 1, f"{path}: {old!r}"
        assert old != new
        if path.endswith(".py"):
            # A worker that cannot be imported fails its fixture, and no test.
            ast.parse(text.replace(old, new))
    assert bool(row.without) != bool(row.because)


def test_rows_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert sum(bool(row.without) for row in ROWS) >= CORE


def test_the_document_shows_the_rows_as_they_are() -> None:
    """`python -m tests.mutations.matrix` writes them."""
    document = DOCUMENT.read_text()

    assert with_matrix(document) == document


def test_mutation_without_exactly_one_match_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")

    with pytest.raises(ValueError, match="2 times"):
        apply(Mutation("a.py", "x = 1", "x = 2"), tmp_path)


def test_only_a_failed_test_counts_as_missing_the_mechanism(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_b[c]"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_d"><error/></testcase>'
        '<testcase classname="tests.test_a" name="test_e"/></testsuite></testsuites>'
    )

    failed = failures(report)

    assert failed == {"tests/test_a.py::test_b[c]"}
    assert is_of("tests/test_a.py::test_b", *failed)
    assert not is_of("tests/test_a.py::test_d", *failed)
