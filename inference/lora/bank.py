"""The adapters inside the model: banks of low-rank weights beside the base weights, and the hooks that apply them.

A page holds `PAGE_RANK` ranks of *every* layer that any adapter has touched, so that an adapter of rank r is
ceil(r / PAGE_RANK) pages, loading one is one copy, and several adapters of one lane are their pages side by side. Page
0 is zero. In a forward every row of the batch names its pages; each layer gathers their A and B and adds (x Aᵀ) B with
two batched matrix products. The base weights are never written.

The number of pages is fixed. Layers that an adapter is the first to touch get a slab for each kind of them, one tensor
[pages, width of these layers], and keep it: the bank grows without a copy, and no page is ever moved.

The paging follows S-LoRA (Sheng et al., 2023), the batched gather Punica's BGMV (Chen et al., 2023).
"""

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from config.logs import log_event
from inference.lora.adapter import Adapter
from inference.lora.adapter_memory import UNLIMITED, AdapterMemory
from inference.lora.layers import PAGE_RANK, LayerGroup, Slab, by_kind, fill, layer_groups
from inference.lora.slabs import split, zeros
from inference.lora.slots import ZERO_PAGE

logger = logging.getLogger(__name__)


class AppliedAdapter(NamedTuple):
    """An adapter as one row of a batch wants it: the pages it fills, and how strongly."""

    pages: tuple[int, ...]
    scale: float


RowAdapters = tuple[AppliedAdapter, ...]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter laid out in pages: its part of each slab, [pages, width], in the bank's dtype and on its device, or in
    pinned host memory where the device had no room for a copy."""

    num_pages: int
    parts: Mapping[Slab, torch.Tensor]
    groups: frozenset[LayerGroup]


@dataclass(frozen=True, slots=True)
class _Route:
    """Which pages each row uses in one layer: `index` [rows · pages a row], `scales` [rows, pages a row, 1, 1] or None
    where all are 1."""

    num_rows: int
    index: torch.Tensor
    scales: torch.Tensor | None


@dataclass(slots=True)
class _Routing:
    """What the coming forwards' rows wear, and the routes found from it: None for groups that no adapter touches."""

    rows: tuple[RowAdapters, ...]
    by_group: dict[LayerGroup, _Route | None] = field(default_factory=dict)
    by_rows: dict[tuple[RowAdapters, ...], _Route | None] = field(default_factory=dict)


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
        """`models` by the names that adapters' layers begin with. EngineStartFailed where `memory` holds too little."""
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
        self._token_counts: Mapping[str, Sequence[int]] = {}
        self._downs: dict[LayerGroup, tuple[torch.Tensor, torch.Tensor]] = {}
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Memory of the pages that are allocated, on the device."""
        return sum(slab.pages.nbytes for slab in self._slabs if slab.pages is not None)

    @property
    def num_bytes_to_come(self) -> int:
        """What pages of layers that no adapter has touched yet may still take there."""
        return self._max_bytes - self.num_bytes

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Lay the adapter out in pages, with a new slab for layers not seen before."""
        places = {name: self._places[name] for name in adapter.layers}
        groups = frozenset(group for group, _ in places.values())
        slabs = self._lay_out(groups)
        num_pages = math.ceil(max(layer.rank for layer in adapter.layers.values()) / PAGE_RANK)
        size = num_pages * sum(slab.width for slab in slabs)
        staged = torch.zeros(size, dtype=self._dtype, pin_memory=self._copy_stream is not None)
        parts = split(staged, slabs, num_pages)
        for name, layer in adapter.layers.items():
            group, member = places[name]
            fill(parts[group.slab], group, member, layer)
        return PackedAdapter(num_pages, split(self._to_device(staged), slabs, num_pages), groups)

    def write(self, place: tuple[int, ...], packed: PackedAdapter) -> None:
        """Put a packed adapter into the pages numbered `place`, over whatever was there. `torch.OutOfMemoryError`, with
        nothing written, where the device has no room for a new slab."""
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
        """Does the adapter in these pages change the model called so?"""
        return any(group.names[0].startswith(f"{model}.") for group in self._contents[applied.pages[0]])

    def route(
        self, rows: Sequence[RowAdapters], token_counts: Mapping[str, Sequence[int]] = MappingProxyType({})
    ) -> None:
        """Have the next forwards apply these adapters to their rows, in order; `()` is a row without any.

        `token_counts`, by layer: an input [tokens of all rows, in] has so many of each row, one row behind the other.
        """
        self._token_counts = token_counts
        # Of a forward that broke off: what its layers read is not read again, and takes memory.
        self._downs.clear()
        wanted = tuple(rows)
        if not any(wanted):
            self._routing = None
        elif self._routing is None or self._routing.rows != wanted:
            self._routing = _Routing(wanted)

    def _route_in(self, routing: _Routing, group: LayerGroup) -> _Route | None:
        """The rows' way through one group, found once for as long as the rows stay the same.

        Only adapters that touch the group count: one that does not would cost its rank in zeros, in every row.
        """
        if group not in routing.by_group:
            rows = tuple(
                tuple(applied for applied in row if group in self._contents[applied.pages[0]]) for row in routing.rows
            )
            if rows not in routing.by_rows:
                routing.by_rows[rows] = self._find_route(rows) if any(rows) else None
            routing.by_group[group] = routing.by_rows[rows]
        return routing.by_group[group]

    def _find_route(self, rows: tuple[RowAdapters, ...]) -> _Route:
        pages = [[page for applied in row for page in applied.pages] for row in rows]
        scales = [[applied.scale for applied in row for _ in applied.pages] for row in rows]
        width = max(map(len, pages))
        padded_pages = [one + [ZERO_PAGE] * (width - len(one)) for one in pages]
        padded_scales = [one + [1.0] * (width - len(one)) for one in scales]
        is_plain = all(scale == 1.0 for one in scales for scale in one)
        return _Route(
            num_rows=len(rows),
            index=self._upload(padded_pages, torch.long).flatten(),
            scales=None if is_plain else self._upload(padded_scales, torch.float32)[:, :, None, None],
        )

    def _upload(self, values: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
        # From pinned memory: any other copy would wait for the step that is running.
        host = torch.tensor(values, dtype=dtype, pin_memory=self._copy_stream is not None)
        return host.to(self._device, non_blocking=True)

    def _lay_out(self, groups: frozenset[LayerGroup]) -> list[Slab]:
        """The slabs of the groups; those that have none yet get new ones, which are allocated when they are written."""
        with self._laying_out:
            new = [group for group in self._groups if group in groups and group.start < 0]
            self._slabs += map(Slab, by_kind(new))
            return [slab for slab in self._slabs if not groups.isdisjoint(slab.groups)]

    def _pages_of(self, slab: Slab) -> torch.Tensor:
        """The slab's pages, allocated at the first call."""
        if slab.pages is None:
            slab.allocate(zeros(self.num_pages + 1, slab.width, device=self._device, dtype=self._dtype))
            for group in slab.groups:
                self._hook(group)
        assert slab.pages is not None, "it was allocated"  # noqa: S101
        return slab.pages

    def _hook(self, group: LayerGroup) -> None:
        for member, module in enumerate(group.modules):
            apply = self._apply_conv if isinstance(module, torch.nn.Conv2d) else self._apply_linear

            def hook(_module: Any, args: Any, output: Any, apply: Any = apply, member: int = member) -> Any:
                route = self._routing and self._route_in(self._routing, group)
                return apply(route, group, member, args[0], output) if route else output

            module.register_forward_hook(hook)

    def _to_device(self, staged: torch.Tensor) -> torch.Tensor:
        """A copy on the device; what was staged itself where there is no room for one beside the steps."""
        try:
            return self._copied(staged)
        except torch.OutOfMemoryError:
            # The slabs have their memory already: they are written from the host, at the cost of a pause.
            log_event(logger, "no memory for a copy of an adapter", logging.WARNING, num_bytes=staged.nbytes)
            return staged

    def _copied(self, staged: torch.Tensor) -> torch.Tensor:
        """On a stream of its own, beside the steps that are running; done when this returns."""
        if self._copy_stream is None:
            return staged
        with torch.cuda.stream(self._copy_stream):
            there = staged.to(self._device, non_blocking=True)
        self._copy_stream.synchronize()
        return there

    def _gather_a(self, route: _Route, group: LayerGroup) -> torch.Tensor:
        """[rows, pages a row · members · PAGE_RANK, in]"""
        return group.a_pages.index_select(0, route.index).view(route.num_rows, -1, group.fan_in)

    def _gather_b(self, route: _Route, group: LayerGroup, member: int) -> torch.Tensor:
        """[rows, pages a row · PAGE_RANK, out], scaled."""
        part = group.b_pages[member].index_select(0, route.index)
        b = part.view(route.num_rows, -1, PAGE_RANK, group.fan_outs[member])
        if route.scales is not None:
            b.mul_(route.scales)
        return b.flatten(1, 2)

    def _apply_linear(
        self, route: _Route, group: LayerGroup, member: int, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        counts = self._token_counts.get(group.names[member])
        if counts is not None:
            return output.add_(self._concatenated_change(route, group, member, x, counts))
        tokens = x if x.ndim == 3 else x[:, None]
        down = self._down(route, group, member, tokens)
        flat = output if output.ndim == 3 else output[:, None]
        return flat.baddbmm_(down, self._gather_b(route, group, member)).view(output.shape)

    def _concatenated_change(
        self, route: _Route, group: LayerGroup, member: int, x: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        """What the adapters add where the rows' tokens are strung together, [tokens of all rows, out]."""
        tokens = torch.nn.utils.rnn.pad_sequence(list(torch.split(x, list(counts))), batch_first=True)
        change = torch.bmm(self._down(route, group, member, tokens), self._gather_b(route, group, member))
        return torch.cat([row[:count] for row, count in zip(change, counts, strict=True)])

    def _down(self, route: _Route, group: LayerGroup, member: int, x: torch.Tensor) -> torch.Tensor:
        """x Aᵀ of one member, [rows, tokens, pages a row · PAGE_RANK]; computed for all members at the first."""
        if len(group.names) == 1:
            return torch.bmm(x, self._gather_a(route, group).mT)
        known = self._downs.pop(group, None)
        if known is None or known[0] is not x:
            known = x, torch.bmm(x, self._gather_a(route, group).mT)
        if member < len(group.names) - 1:
            self._downs[group] = known
        by_member = known[1].view(*x.shape[:2], -1, len(group.names), PAGE_RANK)
        return by_member[:, :, :, member].flatten(2)

    def _apply_conv(
        self, route: _Route, group: LayerGroup, member: int, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        conv = group.modules[member]
        a = self._gather_a(route, group)
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
            down = torch.bmm(a, x.flatten(2))
        else:
            kernels = a.view(-1, x.shape[1], *conv.kernel_size)
            rows_as_channels = x.reshape(1, -1, *x.shape[2:])
            # One group a row: every row is convolved with the kernels of its own adapters.
            down = functional.conv2d(
                rows_as_channels, kernels, None, conv.stride, conv.padding, conv.dilation, groups=route.num_rows
            ).reshape(route.num_rows, a.shape[1], -1)
        delta = torch.bmm(self._gather_b(route, group, member).mT, down)
        return output.add_(delta.view(output.shape))
