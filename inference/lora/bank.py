"""The bank of adapters: their pages beside the base weights, and which of them each row of a batch has.

A page holds `PAGE_RANK` ranks of *every* layer that any adapter has touched, so that an adapter of rank r is
ceil(r / PAGE_RANK) pages, loading one is one copy, and several adapters of one lane are their pages side by side. Page
0 is zero. The base weights are never written.

The number of pages is fixed. Layers that an adapter is the first to touch get a slab for each kind of them, one tensor
[pages, width of these layers], and keep it: the bank grows without a copy, and no page is ever moved.

The paging follows S-LoRA (Sheng et al., 2023). The layers that adapters can change are adapted layers from the bank's
beginning; what they add is settled before a forward, and again only where its rows change.
"""

import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from config.logs import log_event
from inference.device.uploads import upload
from inference.lora.adapter import Adapter
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.layers import PAGE_RANK, LayerGroup, Slab, by_kind, fill, layer_groups, split, zeros
from inference.lora.products.adapted_layers import Products, adapt
from inference.lora.products.low_rank import GatheredWeights, LowRankProducts, gather
from inference.lora.products.paged_products import find_paged_products, has_kernel
from inference.lora.products.rows import AppliedAdapter, RowAdapters, Run, find_runs
from inference.lora.products.static_table import has_paged_products, static_products, tabulate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter laid out in pages: its part of each slab, [pages, width], in the bank's dtype.

    On the bank's device, or in pinned host memory where the device had no room for a copy.
    """

    num_pages: int
    parts: Mapping[Slab, torch.Tensor]
    groups: frozenset[LayerGroup]


class _Routed(NamedTuple):
    """What was routed last: the rows' adapters, and the tokens of the layers that concatenate them."""

    rows: tuple[RowAdapters, ...] = ()
    token_counts: Mapping[str, Sequence[int]] = MappingProxyType({})


class _Tabulated(NamedTuple):
    """The table that was made last, of which rows; None where there can be none of these."""

    rows: tuple[RowAdapters, ...] = ()
    num_rows: int = 0
    table: torch.Tensor | None = None


class AdapterBank:
    """Owner of the pages and of the layers that read them. `pack` may run on any thread, all else on the engine's
    alone."""

    def __init__(
        self,
        models: Mapping[str, torch.nn.Module],
        *,
        device: torch.device,
        dtype: torch.dtype,
        memory: AdapterMemory = UNLIMITED,
    ) -> None:
        """Hold adapters of `models`, by the first part of their layers' names.

        EngineStartFailed where `memory` is too small.
        """
        self._device = device
        self._dtype = dtype
        self._groups = layer_groups(models)
        self._places = {name: (group, i) for group in self._groups for i, name in enumerate(group.names)}
        page_bytes = sum(group.width for group in self._groups) * dtype.itemsize
        self.num_pages = memory.num_pages(page_bytes)
        self.max_bytes = (self.num_pages + 1) * page_bytes
        self._laying_out = threading.Lock()
        self._slabs: list[Slab] = []
        self._contents: dict[int, frozenset[LayerGroup]] = {}
        self._written: dict[int, tuple[Slab, ...]] = {}
        self._routed = _Routed()
        self._tabulated = _Tabulated()
        self._gathered = GatheredWeights()
        self._has_kernel = has_kernel(device)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for group in self._groups:
            adapt(group, group.modules)

    @property
    def num_bytes(self) -> int:
        """Bytes of the allocated pages."""
        return sum(slab.pages.nbytes for slab in self._slabs if slab.pages is not None)

    @property
    def num_bytes_to_come(self) -> int:
        """Bytes that pages of layers not touched yet may still allocate."""
        return self.max_bytes - self.num_bytes

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Lay the adapter out in pages, with a new slab for layers not seen before."""
        places = {name: self._places[name] for name in adapter.layers}
        groups = frozenset(group for group, _ in places.values())
        with self._laying_out:
            # Allocated when they are written.
            self._slabs += map(Slab, by_kind([group for group in self._groups if group in groups and group.start < 0]))
            slabs = [slab for slab in self._slabs if not groups.isdisjoint(slab.groups)]
        num_pages = math.ceil(max(layer.rank for layer in adapter.layers.values()) / PAGE_RANK)
        size = num_pages * sum(slab.width for slab in slabs)
        staged = torch.zeros(size, dtype=self._dtype, pin_memory=self._copy_stream is not None)
        parts = split(staged, slabs, num_pages)
        for name, layer in adapter.layers.items():
            group, member = places[name]
            fill(parts[group.slab], group, member, layer)
        return PackedAdapter(num_pages, split(self._to_device(staged), slabs, num_pages), groups)

    def write(self, place: tuple[int, ...], packed: PackedAdapter) -> None:
        """Write a packed adapter into the pages numbered `place`, over their content.

        `torch.OutOfMemoryError`, with nothing written, where the device has no room for a new slab.
        """
        # The same pages may touch other layers afterwards, by other weights.
        self._set_products(_Routed(), {})
        self._tabulated = _Tabulated()
        self._gathered.forget(place)
        pages = {slab: self._pages_of(slab) for slab in packed.parts}
        for slab, part in packed.parts.items():
            # Page by page: three times as fast as index_copy_ on a CPU.
            for page, content in zip(place, part, strict=True):
                pages[slab][page].copy_(content, non_blocking=True)
            if part.is_cuda:
                part.record_stream(torch.cuda.current_stream(self._device))
        for page in place:
            # The adapter that was in this page before may have touched layers that this one leaves alone.
            for slab in self._written.get(page, ()):
                if slab not in pages:
                    self._pages_of(slab)[page].zero_()
            self._written[page] = tuple(pages)
        self._contents[place[0]] = packed.groups

    def free(self) -> None:
        """Free the memory of all pages, whose adapters are lost."""
        self._set_products(_Routed(), {})
        self._tabulated, self._gathered = _Tabulated(), GatheredWeights()
        self._written.clear()
        self._contents.clear()
        with self._laying_out:
            for slab in self._slabs:
                slab.free()

    def touches(self, applied: AppliedAdapter, model: str) -> bool:
        """Return whether the adapter in these pages changes the model of that name."""
        return any(group.names[0].startswith(f"{model}.") for group in self._contents[applied.pages[0]])

    def route(
        self, rows: Sequence[RowAdapters], token_counts: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> None:
        """Set the adapters that the next forwards apply to their rows, in order; `()` is a row without any.

        `token_counts`, by layer: tokens of each row in an input [tokens of all rows, in] that concatenates them.
        """
        wanted = _Routed(tuple(rows), token_counts)
        if wanted != self._routed:
            # First: where the device has no memory for them, what was routed last stays.
            self._set_products(wanted, self._find_products(wanted))

    def tabulate(self, rows: Sequence[RowAdapters], num_rows: int) -> torch.Tensor | None:
        """Return the table, on the device, of the adapters that rows have, for `reading`; it is made of `num_rows`.

        None where no captured forward can have them: without the kernel, and on convolutions that read neighbours.
        """
        if (tuple(rows), num_rows) != self._tabulated[:2]:
            groups = self._tabulated_groups()
            host = tabulate(groups, self._runs_by_group(rows), num_rows) if self._has_kernel else None
            table = None if host is None else upload(host, self._device)
            self._tabulated = _Tabulated(tuple(rows), num_rows, table)
        return self._tabulated.table

    @contextmanager
    def reading(self, table: torch.Tensor | None, num_rows: int, concatenated: Collection[str]) -> Iterator[None]:
        """Apply to a forward inside the adapters that `table` has when its kernels run; without a table none.

        Whatever is routed is not applied, and forgotten. `concatenated`: see `static_products`.
        """
        groups = self._tabulated_groups()
        products = {} if table is None else static_products(groups, table, num_rows, concatenated)
        self._set_products(_Routed(), products)
        try:
            yield
        finally:
            self._set_products(_Routed(), {})

    def _tabulated_groups(self) -> list[LayerGroup]:
        """Return every group that a resident adapter may change by the kernel: not those that a batch's adapters
        touch, or each mix of adapters would be another graph. Slabs are allocated once, by kinds of layers."""
        allocated = [slab for slab in tuple(self._slabs) if slab.pages is not None]
        return [group for slab in allocated for group in slab.groups if has_paged_products(group)]

    def _set_products(self, routed: _Routed, products: Mapping[LayerGroup, Products]) -> None:
        for group in self._groups:
            group.products = products.get(group)
        self._routed = routed

    def _find_products(self, routed: _Routed) -> Mapping[LayerGroup, Products]:
        """Return the products in each group that an adapter of the rows touches."""
        runs = self._runs_by_group(routed.rows)
        counts = {group: routed.token_counts.get(group.names[0]) for group in runs}
        if self._has_kernel:
            return find_paged_products(runs, counts, self._device)
        # Gathered weights would take a GPU's memory, which is planned to the end.
        find = self._gathered.find if self._device.type == "cpu" else gather
        return {group: LowRankProducts(group, own, find, counts[group]) for group, own in runs.items()}

    def _runs_by_group(self, rows: Sequence[RowAdapters]) -> dict[LayerGroup, tuple[Run, ...]]:
        """Return the runs of rows in each group, without the adapters that do not touch it."""
        contents = {applied: self._contents[applied.pages[0]] for row in rows for applied in row}
        by_touching: dict[tuple[bool, ...], tuple[Run, ...]] = {}
        found: dict[LayerGroup, tuple[Run, ...]] = {}
        for group in frozenset[LayerGroup]().union(*contents.values()):
            touching = tuple(group in groups for groups in contents.values())
            if touching not in by_touching:
                own = [tuple(applied for applied in row if group in contents[applied]) for row in rows]
                by_touching[touching] = find_runs(own)
            found[group] = by_touching[touching]
        return found

    def _pages_of(self, slab: Slab) -> torch.Tensor:
        """Return the slab's pages, allocated at the first call."""
        if slab.pages is None:
            slab.allocate(zeros(self.num_pages + 1, slab.width, device=self._device, dtype=self._dtype))
        assert slab.pages is not None, "it was allocated"  # noqa: S101
        return slab.pages

    def _to_device(self, staged: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device; `staged` itself where there is no room for one beside the steps."""
        try:
            return self._copied(staged)
        except torch.OutOfMemoryError:
            # The slabs have their memory already: they are written from the host, at the cost of a pause.
            log_event(logger, "no memory for a copy of an adapter", logging.WARNING, num_bytes=staged.nbytes)
            return staged

    def _copied(self, staged: torch.Tensor) -> torch.Tensor:
        """Copy on a stream of its own, beside the running steps; complete on return."""
        if self._copy_stream is None:
            return staged
        with torch.cuda.stream(self._copy_stream):
            copied = staged.to(self._device, non_blocking=True)
        self._copy_stream.synchronize()
        return copied
