"""A check of one part, and the row of the table it comes to."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger(__name__)


class CheckFailed(Exception):
    """A part is not usable; the message says what was seen and what to do."""


class CheckUnsure(CheckFailed):
    """A part may be usable or not; the message says what was seen, and what each would mean."""


class State(StrEnum):
    """What a part was found to be."""

    GOOD = "good"
    BAD = "bad"
    UNSURE = "unsure"  # what was seen is seen of a good part as well as of a bad one
    BLOCKED = "blocked"  # it fails too, but it stands on a part that is not good: that one first


@dataclass(frozen=True, slots=True)
class Check:
    """`look` tries the part: it returns what was seen, or raises `CheckFailed`.

    What goes wrong with a part that `stands_on` one that is not good says nothing of the part itself.
    """

    part: str
    look: Callable[[], str]
    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One row: the part, its state, and what was seen or what to do."""

    part: str
    state: State
    detail: str


def run_checks(checks: Iterable[Check], on_begin: Callable[[str], None] = lambda _part: None) -> Iterator[CheckResult]:
    """Try every part, whatever became of the others; a part comes behind those it stands on."""
    not_good: set[str] = set()
    for check in checks:
        on_begin(check.part)
        finding = _try(check, not_good)
        if finding.state is not State.GOOD:
            not_good.add(check.part)
        yield finding


def _try(check: Check, not_good: set[str]) -> CheckResult:
    state = State.BAD
    try:
        return CheckResult(check.part, State.GOOD, check.look())
    except CheckFailed as error:
        detail = str(error)
        state = State.UNSURE if isinstance(error, CheckUnsure) else State.BAD
    except Exception as error:
        # A part's boundary: a bug in one check must not hide the parts behind it.
        logger.debug("a check failed unforeseen", exc_info=error)
        detail = f"unforeseen: {type(error).__name__}: {error}"
    causes = [part for part in check.depends_on if part in not_good]
    if causes:
        return CheckResult(check.part, State.BLOCKED, f"first the {causes[0]}; seen here: {detail}")
    return CheckResult(check.part, state, detail)
