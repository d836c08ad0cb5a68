"""The low-rank products on a GPU: one kernel for the layers of one input, over the pages where they lie.

The table of rows and pages is made on the host and copied before a forward: none of its kernels waits for the host, and
rows without an adapter are in none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from inference.checkpoints.hub import one_line
from inference.device.uploads import upload
from inference.errors import EngineStartFailed
from inference.lora.layers import PAGE_RANK, LayerGroup
from inference.lora.products.low_rank import LowRankProducts, as_tokens, check_rows, gather, is_pointwise
from inference.lora.products.rows import Run

# Ampere. For GPUs before it Triton compiles the kernel without tensor cores, and its values spill.
MIN_CAPABILITY = (8, 0)
# Tokens of one program, and the columns of weights that it reads at once. 64 tokens fill a tensor core's tile, and
# a row of a batch has hundreds. 32 bits are multiplied without tensor cores, in registers alone.
TILES = {"BLOCK_TOKENS": 64, "BLOCK_IN": 64, "BLOCK_OUT": 64}
TILES_IN_32_BITS = {"BLOCK_TOKENS": 32, "BLOCK_IN": 32, "BLOCK_OUT": 32}
ADVICE = (
    "Triton needs gcc and Python's headers (on Debian gcc, libc6-dev and python3-dev), and in TRITON_CACHE_DIR a folder"
    " that is writable and not noexec"
)
# The kernel, once it was launched: what fails afterwards is the device, not the build.
_launched: set[Any] = set()
# Programs that keep the largest GPUs busy: where blocks of tokens are fewer, the outputs are split among several.
BUSY = 132


class Table(NamedTuple):
    """The touched rows of a group on the device: `rows` as the kernel reads them, and their entries' pages and scales.

    `num_tokens`: of the longest row, where the input is [tokens of all rows, in].
    """

    rows: torch.Tensor
    pages: torch.Tensor
    scales: torch.Tensor
    num_tokens: int | None


def find_paged_products(
    runs: Mapping[LayerGroup, Sequence[Run]],
    token_counts: Mapping[LayerGroup, Sequence[int] | None],
    device: torch.device,
) -> "dict[LayerGroup, PagedProducts]":
    """Return the products of each group. `torch.OutOfMemoryError` where the device has no room for their tables."""
    keys = {group: (own, _hashable(token_counts[group])) for group, own in runs.items()}
    tables = _upload_tables(list(dict.fromkeys(keys.values())), device)
    return {group: PagedProducts(group, runs[group], token_counts[group], tables[key]) for group, key in keys.items()}


class PagedProducts:
    """The products of the rows' adapters in one group."""

    def __init__(
        self, group: LayerGroup, runs: Sequence[Run], token_counts: Sequence[int] | None, table: Table
    ) -> None:
        """`token_counts`: tokens of each row, where the input is [tokens of all rows, in]."""
        self._group = group
        self._num_rows = sum(token_counts) if token_counts else sum(run.num_rows for run in runs)
        self._table = table
        # Of convolutions that read neighbours: they run by cuDNN, run by run.
        self._by_runs = LowRankProducts(group, runs, gather)

    def add(self, x: torch.Tensor, outputs: Sequence[torch.Tensor], first: int) -> None:
        """Add the products of `x` to the `outputs` of the layers from the one numbered `first` on, in place.

        ValueError where `x` has other rows than the adapters were routed for.
        """
        check_rows(x, self._num_rows)
        conv = self._group.conv
        if conv is None:
            launch_over_pages(self._group, self._table, x, [one.view(-1, one.shape[-1]) for one in outputs], first)
        elif is_pointwise(conv) and outputs[0].is_contiguous(memory_format=torch.channels_last):
            tokens = as_tokens(outputs[0])
            launch_over_pages(self._group, self._table, as_tokens(x), [tokens.view(-1, tokens.shape[-1])], first)
        else:
            self._by_runs.add(x, outputs, first)


def launch_over_pages(
    group: LayerGroup, table: Table, x: torch.Tensor, outputs: Sequence[torch.Tensor], first: int
) -> None:
    """Add the products of the rows in `table` to views [tokens, out] of the outputs, by one launch."""
    # The kernel reads rows one behind another.
    x = x.contiguous()
    if not all(one.is_contiguous() for one in outputs):
        raise ValueError("a layer's output is not contiguous: its adapters cannot be added in place")
    tokens_per_row = 1 if table.num_tokens is not None else x.shape[1:-1].numel()
    tiles = TILES_IN_32_BITS if x.dtype is torch.float32 else TILES
    num_blocks = -(-(table.num_tokens or tokens_per_row) // tiles["BLOCK_TOKENS"])
    num_programs = num_blocks * len(table.rows) * len(outputs)
    num_splits = max(1, min(BUSY // num_programs, max(one.shape[1] for one in outputs) // tiles["BLOCK_OUT"]))
    slab = group.slab.pages
    assert slab is not None, "an adapter was written"  # noqa: S101
    starts = [group.b_start(first + i) for i in range(len(outputs))]
    # Pointers and widths of three layers: the last's again where there are fewer.
    three = [min(i, len(outputs) - 1) for i in range(3)]
    launch(
        (num_blocks * len(table.rows), len(outputs), num_splits),
        x,
        table.rows,
        table.pages,
        table.scales,
        slab,
        *(outputs[i] for i in three),
        group.a_start(first),
        *(starts[i] for i in three),
        x.shape[-1],
        *(outputs[i].shape[1] for i in three),
        slab.shape[1],
        tokens_per_row,
        num_blocks,
        num_splits,
        PAGE_RANK=PAGE_RANK,
        **tiles,
    )


def has_kernel(device: torch.device) -> bool:
    """Return whether the device multiplies by the kernel, and not by torch's own products."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def launch(grid: tuple[int, int, int], *args: Any, **constants: int) -> None:
    """Launch the kernel `add_pages`. EngineStartFailed where it cannot be built, at the first launch of the process."""
    try:
        # Here: where no GPU is, Triton need not be installed.
        from inference.lora.products.kernels import add_pages  # noqa: PLC0415

        add_pages[grid](*args, **constants)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if _launched:
            raise
        reason = f"the kernel of the adapters cannot be built ({type(error).__name__}: {one_line(error)})"
        raise EngineStartFailed(f"{reason}: {ADVICE}") from error
    _launched.add(add_pages)


def _upload_tables(
    keys: Sequence[tuple[Sequence[Run], tuple[int, ...] | None]], device: torch.device
) -> dict[Any, Table]:
    """Copy the tables of these runs and token counts to the device, all at once."""
    rows: list[list[int]] = []
    pages: list[int] = []
    scales: list[float] = []
    spans: list[tuple[int, int]] = []
    for runs, counts in keys:
        first = len(rows)
        for number, adapters in enumerate(adapters for run in runs for adapters in [run.adapters] * run.num_rows):
            own = [(page, applied.scale) for applied in adapters for page in applied.pages]
            place = (number, -1) if counts is None else (sum(counts[:number]), counts[number])
            if own:
                rows.append([*place, len(pages), len(own)])
                pages += [page for page, _ in own]
                scales += [scale for _, scale in own]
        spans.append((first, len(rows)))
    numbers = torch.tensor([*(number for row in rows for number in row), *pages], dtype=torch.int32)
    copied = upload(torch.cat((numbers, torch.tensor(scales, dtype=torch.float32).view(torch.int32))), device)
    of_rows, of_pages, of_scales = torch.split(copied, [4 * len(rows), len(pages), len(scales)])
    tables = of_rows.view(-1, 4)
    return {
        key: Table(tables[first:last], of_pages, of_scales.view(torch.float32), max(key[1]) if key[1] else None)
        for key, (first, last) in zip(keys, spans, strict=True)
    }


def _hashable(counts: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if counts is None else tuple(counts)
