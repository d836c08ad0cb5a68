"""The figures of `make house`, on a small tree made here."""

import json
from pathlib import Path

import pytest

from tests.support.house import PACKAGES, figures, is_imperative, main, survey

GOOD = '''"""Jobs."""


def run(job):
    """Run the job."""
    if job is None:
        raise ValueError
    step(job)
    step(job)
    return job


def step(job):
    """Advance the job by a step."""
    if job.is_done:
        return
    try:
        job.advance()
    except OSError:
        job.fail()
'''
BAD = '''"""What nobody knows."""


def told():
    """What is told of a job."""
    try:
        return _only()
    except (ValueError, Exception):  # noqa: BLE001
        return "# noqa is text here"


def _only():
    return 1
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Write a tree with one good file in each package."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "jobs.py").write_text(GOOD)
    return tmp_path


def values_of(tree: Path) -> dict[str, float]:
    return {row.name: row.value for row in figures(survey(tree))}


def test_a_tree_that_meets_every_goal_passes(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(tree)])

    out = capsys.readouterr().out
    assert code == 0, out
    assert "missed" not in out
    assert json.loads(out.splitlines()[-1]) == values_of(tree)


def test_each_figure_counts_what_it_names(tree: Path) -> None:
    (tree / "worker" / "bad.py").write_text(BAD)

    values = values_of(tree)

    lines = (len(GOOD.splitlines()) * len(PACKAGES) + len(BAD.splitlines())) / 1000
    assert values["modules in the largest folder"] == 2
    assert values["private functions with one caller, %"] == round(100 / 12, 1)
    assert values["suppressions per 1000 lines"] == round(1 / lines, 2)
    assert values["broad excepts per 1000 lines"] == round(1 / lines, 2)
    assert values["docstrings of functions without an imperative"] == 1
    assert values["everyday words per 1000 of docstrings"] == round(3000 / (len(PACKAGES) * 10 + 9), 2)


def test_a_missed_goal_is_marked_and_ends_with_1(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "config" / "long.py").write_text("def f():\n" + "    f()\n" * 300)

    code = main([str(tree), "--list"])

    out = capsys.readouterr().out
    assert code == 1
    assert {line.split("  ")[0] for line in out.splitlines() if line.endswith("missed")} == {
        "functions over 50 lines",
        "files over 300 lines",
    }
    assert "301 lines: config/long.py" in out


def test_a_folder_without_the_packages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path)])

    assert refused.value.code == 2


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the key.", True),
        ("Pass it on.", True),
        ("True for inpainting checkpoints.", True),
        ("Returns the key.", False),
        ("What a job names.", False),
        ("The key.", False),
        ("", False),
    ],
)
def test_an_imperative_is_guessed_from_the_first_word(docstring: str, expected: bool) -> None:
    assert is_imperative(docstring) == expected
