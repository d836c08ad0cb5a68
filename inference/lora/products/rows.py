"""The adapters of a batch's rows, and the runs of neighbouring rows that have the same."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple


class AppliedAdapter(NamedTuple):
    """An adapter applied to one row of a batch: its pages, and its scale."""

    pages: tuple[int, ...]
    scale: float


RowAdapters = tuple[AppliedAdapter, ...]


class Run(NamedTuple):
    """Neighbouring rows with the same adapters."""

    num_rows: int
    adapters: RowAdapters


def find_runs(rows: Sequence[RowAdapters]) -> tuple[Run, ...]:
    """Return the runs of `rows`, in order."""
    return tuple(Run(len(list(same)), adapters) for adapters, same in groupby(rows))
