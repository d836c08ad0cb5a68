"""The table of a captured forward's adapters: one tensor of one length for each number of rows, whatever adapters they
have, so that a CUDA graph reads it in place.

Every layer group that an adapter can change by the kernel has as many entries in it as there are rows; those of rows
that have no adapter there have no pages. What differs from batch to batch is its numbers alone.
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from inference.lora.layers import LayerGroup
from inference.lora.products.low_rank import as_tokens, check_rows, is_pointwise
from inference.lora.products.paged_products import Table, launch_over_pages
from inference.lora.products.rows import RowAdapters, Run

# Places in the table for the pages and scales of all rows: ranks of 512 for each.
PAGES_PER_ROW = 64
NUMBERS_PER_ENTRY = 4


def has_paged_products(group: LayerGroup) -> bool:
    """Return whether the kernel multiplies for these layers. Convolutions that read neighbours run by cuDNN."""
    return group.conv is None or is_pointwise(group.conv)


def tabulate(
    groups: Sequence[LayerGroup], runs: Mapping[LayerGroup, Sequence[Run]], num_rows: int
) -> torch.Tensor | None:
    """Return the table of `num_rows` rows, in host memory; the last of them may be without a run.

    None where it cannot hold the rows' adapters: some are of other layers than `groups`, or of too many pages.
    """
    if not runs.keys() <= set(groups):
        return None
    pages: list[int] = []
    scales: list[float] = []
    places: dict[RowAdapters, tuple[int, int]] = {(): (0, 0)}
    entries: dict[Sequence[Run], torch.Tensor] = {}
    for own in dict.fromkeys([(), *runs.values()]):
        of_rows = [adapters for run in own for adapters in [run.adapters] * run.num_rows]
        of_rows += [()] * (num_rows - len(of_rows))
        for adapters in of_rows:
            if adapters not in places:
                num_before = len(pages)
                pages += [page for applied in adapters for page in applied.pages]
                scales += [applied.scale for applied in adapters for _ in applied.pages]
                places[adapters] = num_before, len(pages) - num_before
        numbers = [[row, -1, *places[adapters]] for row, adapters in enumerate(of_rows)]
        entries[own] = torch.tensor(numbers, dtype=torch.int32)
    capacity = num_rows * PAGES_PER_ROW
    if len(pages) > capacity:
        return None
    table = torch.zeros(len(groups) * num_rows * NUMBERS_PER_ENTRY + 2 * capacity, dtype=torch.int32)
    of_groups, of_pages, of_scales = _parts(table, len(groups), num_rows)
    torch.stack([entries[runs.get(group, ())] for group in groups], out=of_groups)
    of_pages[: len(pages)] = torch.tensor(pages, dtype=torch.int32)
    of_scales[: len(scales)] = torch.tensor(scales, dtype=torch.float32)
    return table


def static_products(
    groups: Sequence[LayerGroup], table: torch.Tensor, num_rows: int, concatenated: Collection[str]
) -> "dict[LayerGroup, StaticProducts]":
    """Return the products of each group, which read `table` in place.

    `concatenated`: layers whose input is [tokens of all rows, in], of which all rows have equally many.
    """
    of_groups, of_pages, of_scales = _parts(table, len(groups), num_rows)
    return {
        group: StaticProducts(
            group, Table(entries, of_pages, of_scales, None), is_concatenated=group.names[0] in concatenated
        )
        for group, entries in zip(groups, of_groups, strict=True)
    }


class StaticProducts:
    """The products in one group of the adapters that a static table has when they are computed."""

    def __init__(self, group: LayerGroup, table: Table, *, is_concatenated: bool) -> None:
        self._group = group
        self._table = table
        self._is_concatenated = is_concatenated

    def add(self, x: torch.Tensor, outputs: Sequence[torch.Tensor], first: int) -> None:
        """Add the products of `x` to the `outputs` of the layers from the one numbered `first` on, in place.

        ValueError where `x` has other rows than the table, or the kernel cannot read it in place.
        """
        num_rows = len(self._table.rows)
        if self._group.conv is not None:
            x, outputs = as_tokens(x), [as_tokens(one) for one in outputs]
        if self._is_concatenated:
            x = x.reshape(num_rows, -1, x.shape[-1])
        check_rows(x, num_rows)
        launch_over_pages(self._group, self._table, x, [one.view(-1, one.shape[-1]) for one in outputs], first)


def _parts(table: torch.Tensor, num_groups: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views of the entries [groups, rows, 4], the pages and the scales."""
    capacity = num_rows * PAGES_PER_ROW
    entries, pages, scales = torch.split(table, [len(table) - 2 * capacity, capacity, capacity])
    return entries.view(num_groups, num_rows, NUMBERS_PER_ENTRY), pages, scales.view(torch.float32)
