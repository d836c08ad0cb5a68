"""A row of the fault matrix: what breaks, which tests show that it has no effect, and what of our code makes it so."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A mechanism taken out: in file `path`, the text `old`, which is there exactly once, becomes `new`."""

    path: str
    old: str
    new: str


class Row(NamedTuple):
    """One fault, in our own words.

    `tests` are pytest ids; each of them must fail where `without` is applied. Tests that show the same, but by another
    mechanism, are in `also`. A row may hold by what is not there to be taken out: then `without` is None and `because`
    says why nothing can be.
    """

    name: str
    fault: str
    answer: str
    tests: tuple[str, ...]
    without: tuple[Mutation, ...] = ()
    also: tuple[str, ...] = ()
    because: str = ""
