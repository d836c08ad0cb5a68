"""A check of one part, and its result."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger(__name__)


class CheckFailed(Exception):
    """The part is not usable; the message says what was seen and what to do."""


class CheckUnsure(CheckFailed):
    """The part may be usable or not; the message says what was seen, and what each case would mean."""


class NotTried(Exception):
    """The part is not of this machine; the message says why."""


class State(StrEnum):
    """The state of a part."""

    GOOD = "good"
    BAD = "bad"
    UNSURE = "unsure"  # a good part and a bad one would look the same
    NOT_TRIED = "not tried"
    BLOCKED = "blocked"  # it fails, and so does a part that it depends on: that one first


@dataclass(frozen=True, slots=True)
class Check:
    """The check of a part: `run` returns what was seen, or raises `CheckFailed`.

    The failure of a part says nothing of the part itself where one of its `depends_on` is not good.
    """

    part: str
    run: Callable[[], str]
    depends_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One row: the part, its state, and what was seen or what to do."""

    part: str
    state: State
    detail: str


def run_checks(checks: Iterable[Check], on_begin: Callable[[str], None] = lambda _part: None) -> Iterator[CheckResult]:
    """Run every check, whatever the results of the others; a part comes after those it depends on."""
    not_good: set[str] = set()
    for check in checks:
        on_begin(check.part)
        try:
            state, detail = State.GOOD, check.run()
        except NotTried as reason:
            yield CheckResult(check.part, State.NOT_TRIED, str(reason))
            continue
        except CheckFailed as error:
            state = State.UNSURE if isinstance(error, CheckUnsure) else State.BAD
            detail = str(error)
        except Exception as error:
            # A part's boundary: a bug in one check must not hide the parts behind it.
            logger.debug("a check failed unforeseen", exc_info=error)
            state, detail = State.BAD, f"unforeseen: {type(error).__name__}: {error}"
        if state is not State.GOOD:
            causes = [part for part in check.depends_on if part in not_good]
            if causes:
                state, detail = State.BLOCKED, f"first the {causes[0]}; seen here: {detail}"
            not_good.add(check.part)
        yield CheckResult(check.part, state, detail)
