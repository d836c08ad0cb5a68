"""The adapters inside the model: banks of low-rank weights beside the base weights, and the hooks that apply them.

The bank is one matrix of pages. A page holds `PAGE_RANK` ranks of *every* layer that any adapter has touched, so that
an adapter of rank r is ceil(r / PAGE_RANK) pages, loading one is one copy, and several adapters of one lane are their
pages side by side. Page 0 is zero. In a forward every row of the batch names its pages; each layer gathers their A and
B and adds (x Aᵀ) B with two batched matrix products. The base weights are never written.

The paging follows S-LoRA (Sheng et al., 2023), the batched gather Punica's BGMV (Chen et al., 2023).
"""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from inference.adapters import Adapter
from inference.layers import PAGE_RANK, LayerGroup, fill, layer_groups
from inference.slots import ZERO_PAGE


class Applied(NamedTuple):
    """An adapter as one row of a batch wants it: the pages it fills, and how strongly."""

    pages: tuple[int, ...]
    scale: float


Row = tuple[Applied, ...]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter laid out in pages, [pages, width], in the bank's dtype and on its device."""

    pages: torch.Tensor
    groups: frozenset[LayerGroup]

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]


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

    rows: tuple[Row, ...]
    by_group: dict[LayerGroup, _Route | None] = field(default_factory=dict)
    by_rows: dict[tuple[Row, ...], _Route | None] = field(default_factory=dict)


class AdapterBank:
    """Owner of the pages and of the hooks. `pack` may run on any thread, all else on the engine's alone."""

    def __init__(self, models: Mapping[str, torch.nn.Module], *, device: torch.device, dtype: torch.dtype) -> None:
        """`models` by the names that adapters' layers begin with."""
        self._device = device
        self._dtype = dtype
        self._places = {name: (group, i) for group in layer_groups(models) for i, name in enumerate(group.names)}
        self._growing = threading.Lock()
        self._laid_out: list[LayerGroup] = []
        self._width = 0
        self._num_hooked = 0
        self._pages = torch.zeros(1, 0, device=device, dtype=dtype)
        self._contents: dict[int, frozenset[LayerGroup]] = {}
        self._routing: _Routing | None = None
        self._token_counts: Mapping[str, Sequence[int]] = {}
        self._downs: dict[LayerGroup, tuple[torch.Tensor, torch.Tensor]] = {}
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        """Memory of the pages, on the device."""
        return self._pages.numel() * self._pages.element_size()

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Lay the adapter out in pages, and make room in every page for layers not seen before."""
        places = {name: self._places[name] for name in adapter.layers}
        groups = frozenset(group for group, _ in places.values())
        width = self._lay_out(groups)
        num_pages = math.ceil(max(layer.rank for layer in adapter.layers.values()) / PAGE_RANK)
        pages = torch.zeros(num_pages, width, dtype=self._dtype, pin_memory=self._copy_stream is not None)
        for name, layer in adapter.layers.items():
            fill(pages, *places[name], layer)
        return PackedAdapter(self._to_device(pages), groups)

    def write(self, place: tuple[int, ...], packed: PackedAdapter) -> None:
        """Put a packed adapter into the pages numbered `place`, over whatever was there."""
        self._grow(max(place) + 1)
        width = packed.pages.shape[1]
        # Page by page: three times as fast as index_copy_ on a CPU.
        for page, content in zip(place, packed.pages, strict=True):
            self._pages[page, :width] = content
            # Layers that came up after the packing: this adapter does not touch them, the one before it may have.
            self._pages[page, width:] = 0
        if packed.pages.is_cuda:
            packed.pages.record_stream(torch.cuda.current_stream(self._device))
        self._contents[place[0]] = packed.groups
        # The same pages may touch other layers now.
        self._routing = None

    def touches(self, applied: Applied, model: str) -> bool:
        """Does the adapter in these pages change the model called so?"""
        return any(group.names[0].startswith(f"{model}.") for group in self._contents[applied.pages[0]])

    def route(self, rows: Sequence[Row], token_counts: Mapping[str, Sequence[int]] = MappingProxyType({})) -> None:
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

    def _find_route(self, rows: tuple[Row, ...]) -> _Route:
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

    def _lay_out(self, groups: frozenset[LayerGroup]) -> int:
        """Give every group its part of the page. Pages only ever get wider, so that what was packed stays right."""
        with self._growing:
            for group in groups:
                if group.start < 0:
                    group.start = self._width
                    self._width += group.width
                    self._laid_out.append(group)
            return self._width

    def _grow(self, num_pages: int) -> None:
        """Make the matrix as wide as the layout and at least `num_pages` high, and hook what it now covers."""
        width = self._width
        height = self._pages.shape[0]
        if num_pages > height or width > self._pages.shape[1]:
            height = max(height, num_pages + (num_pages // 4 if num_pages > height else 0))
            grown = torch.zeros(height, width, device=self._device, dtype=self._dtype)
            grown[: self._pages.shape[0], : self._pages.shape[1]] = self._pages
            self._pages = grown
        for group in self._laid_out[self._num_hooked :]:
            self._hook(group)
            self._num_hooked += 1

    def _hook(self, group: LayerGroup) -> None:
        for member, module in enumerate(group.modules):
            apply = self._apply_conv if isinstance(module, torch.nn.Conv2d) else self._apply_linear

            def hook(_module: Any, args: Any, output: Any, apply: Any = apply, member: int = member) -> Any:
                route = self._routing and self._route_in(self._routing, group)
                return apply(route, group, member, args[0], output) if route else output

            module.register_forward_hook(hook)

    def _to_device(self, pages: torch.Tensor) -> torch.Tensor:
        """On a stream of its own, beside the steps that are running; done when this returns."""
        if self._copy_stream is None:
            return pages
        with torch.cuda.stream(self._copy_stream):
            there = pages.to(self._device, non_blocking=True)
        self._copy_stream.synchronize()
        return there

    def _gather_a(self, route: _Route, group: LayerGroup) -> torch.Tensor:
        """[rows, pages a row · members · PAGE_RANK, in]"""
        part = self._pages.narrow(1, group.start, group.a_width)
        return part.index_select(0, route.index).view(route.num_rows, -1, group.fan_in)

    def _gather_b(self, route: _Route, group: LayerGroup, member: int) -> torch.Tensor:
        """[rows, pages a row · PAGE_RANK, out], scaled."""
        part = self._pages.narrow(1, *group.b_span(member)).index_select(0, route.index)
        b = part.view(route.num_rows, -1, PAGE_RANK, group.fan_outs[member])
        if route.scales is not None:
            b.mul_(route.scales)
        return b.flatten(1, 2)

    def _apply_linear(
        self, route: _Route, group: LayerGroup, member: int, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        counts = self._token_counts.get(group.names[member])
        if counts is not None:
            return output.add_(self._change_of_strung(route, group, member, x, counts))
        tokens = x if x.ndim == 3 else x[:, None]
        down = self._down(route, group, member, tokens)
        flat = output if output.ndim == 3 else output[:, None]
        return flat.baddbmm_(down, self._gather_b(route, group, member)).view(output.shape)

    def _change_of_strung(
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
