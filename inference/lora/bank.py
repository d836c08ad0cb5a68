"""The bank of adapters: their pages beside the base weights, and the hooks that apply them to each row of a batch.

A page holds `PAGE_RANK` ranks of *every* layer that any adapter has touched, so that an adapter of rank r is
ceil(r / PAGE_RANK) pages, loading one is one copy, and several adapters of one lane are their pages side by side. Page
0 is zero. The base weights are never written.

The number of pages is fixed. Layers that an adapter is the first to touch get a slab for each kind of them, one tensor
[pages, width of these layers], and keep it: the bank grows without a copy, and no page is ever moved.

The paging follows S-LoRA (Sheng et al., 2023).
"""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from config.logs import log_event
from inference.lora.adapter import Adapter
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.layers import PAGE_RANK, LayerGroup, Slab, by_kind, fill, layer_groups, split, zeros
from inference.lora.low_rank import LowRankProducts, Route
from inference.lora.slots import ZERO_PAGE

logger = logging.getLogger(__name__)


class AppliedAdapter(NamedTuple):
    """An adapter applied to one row of a batch: its pages, and its scale."""

    pages: tuple[int, ...]
    scale: float


RowAdapters = tuple[AppliedAdapter, ...]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter laid out in pages: its part of each slab, [pages, width], in the bank's dtype.

    On the bank's device, or in pinned host memory where the device had no room for a copy.
    """

    num_pages: int
    parts: Mapping[Slab, torch.Tensor]
    groups: frozenset[LayerGroup]


@dataclass(slots=True)
class _Routing:
    """Adapters per batch row for the next forwards, and the page routes computed from them (None: no adapter)."""

    rows: tuple[RowAdapters, ...]
    by_group: dict[LayerGroup, Route | None] = field(default_factory=dict)
    by_rows: dict[tuple[RowAdapters, ...], Route | None] = field(default_factory=dict)


class AdapterBank:
    """Owner of the pages and of the hooks. `pack` may run on any thread, all else on the engine's alone."""

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
        self._max_bytes = (self.num_pages + 1) * page_bytes
        self._laying_out = threading.Lock()
        self._slabs: list[Slab] = []
        self._contents: dict[int, frozenset[LayerGroup]] = {}
        self._written: dict[int, tuple[Slab, ...]] = {}
        self._routing: _Routing | None = None
        self._products = LowRankProducts()
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Bytes of the allocated pages."""
        return sum(slab.pages.nbytes for slab in self._slabs if slab.pages is not None)

    @property
    def num_bytes_to_come(self) -> int:
        """Bytes that pages of layers not touched yet may still allocate."""
        return self._max_bytes - self.num_bytes

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
        # The same pages may touch other layers now.
        self._routing = None

    def touches(self, applied: AppliedAdapter, model: str) -> bool:
        """Return whether the adapter in these pages changes the model of that name."""
        return any(group.names[0].startswith(f"{model}.") for group in self._contents[applied.pages[0]])

    def route(
        self, rows: Sequence[RowAdapters], token_counts: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> None:
        """Set the adapters that the next forwards apply to their rows, in order; `()` is a row without any.

        `token_counts`, by layer: tokens of each row in an input [tokens of all rows, in] that concatenates them.
        """
        self._products.begin_forward(token_counts)
        wanted = tuple(rows)
        if not any(wanted):
            self._routing = None
        elif self._routing is None or self._routing.rows != wanted:
            self._routing = _Routing(wanted)

    def _route_in(self, routing: _Routing, group: LayerGroup) -> Route | None:
        """Return the rows' route in one group, computed once while the rows stay the same.

        It leaves out adapters that do not touch the group: each would cost its rank in zeros, in every row.
        """
        if group not in routing.by_group:
            rows = tuple(
                tuple(applied for applied in row if group in self._contents[applied.pages[0]]) for row in routing.rows
            )
            if rows not in routing.by_rows:
                routing.by_rows[rows] = self._find_route(rows) if any(rows) else None
            routing.by_group[group] = routing.by_rows[rows]
        return routing.by_group[group]

    def _find_route(self, rows: tuple[RowAdapters, ...]) -> Route:
        pages = [[page for applied in row for page in applied.pages] for row in rows]
        scales = [[applied.scale for applied in row for _ in applied.pages] for row in rows]
        width = max(map(len, pages))
        padded_pages = [one + [ZERO_PAGE] * (width - len(one)) for one in pages]
        padded_scales = [one + [1.0] * (width - len(one)) for one in scales]
        is_plain = all(scale == 1.0 for one in scales for scale in one)
        return Route(
            num_rows=len(rows),
            index=self._upload(padded_pages, torch.long).flatten(),
            scales=None if is_plain else self._upload(padded_scales, torch.float32)[:, :, None, None],
        )

    def _upload(self, values: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
        # From pinned memory: any other copy would wait for the step that is running.
        host = torch.tensor(values, dtype=dtype, pin_memory=self._copy_stream is not None)
        return host.to(self._device, non_blocking=True)

    def _pages_of(self, slab: Slab) -> torch.Tensor:
        """Return the slab's pages, allocated at the first call."""
        if slab.pages is None:
            slab.allocate(zeros(self.num_pages + 1, slab.width, device=self._device, dtype=self._dtype))
            for group in slab.groups:
                self._hook(group)
        assert slab.pages is not None, "it was allocated"  # noqa: S101
        return slab.pages

    def _hook(self, group: LayerGroup) -> None:
        products = self._products
        for member, module in enumerate(group.modules):
            apply = products.add_to_conv if isinstance(module, torch.nn.Conv2d) else products.add_to_linear

            def hook(_module: Any, args: Any, output: Any, apply: Any = apply, member: int = member) -> Any:
                route = self._routing and self._route_in(self._routing, group)
                return apply(route, group, member, args[0], output) if route else output

            module.register_forward_hook(hook)

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
