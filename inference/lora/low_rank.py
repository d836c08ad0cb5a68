"""The low-rank products of a forward: (x Aᵀ) B of each row's own adapters, added to a layer's output.

Each layer gathers the A and B of its rows' pages and multiplies them in two batched matrix products, as Punica's BGMV
(Chen et al., 2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn import functional

from inference.lora.layers import PAGE_RANK, LayerGroup


@dataclass(frozen=True, slots=True)
class Route:
    """The pages of each row in one layer.

    `index` [rows · pages a row]; `scales` [rows, pages a row, 1, 1], None where all are 1.
    """

    num_rows: int
    index: torch.Tensor
    scales: torch.Tensor | None

    def gather_a(self, group: LayerGroup) -> torch.Tensor:
        """Return A of all members, [rows, pages a row · members · PAGE_RANK, in]."""
        return group.a_pages.index_select(0, self.index).view(self.num_rows, -1, group.fan_in)

    def gather_b(self, group: LayerGroup, member: int) -> torch.Tensor:
        """Return the member's B, scaled, [rows, pages a row · PAGE_RANK, out]."""
        part = group.b_pages[member].index_select(0, self.index)
        b = part.view(self.num_rows, -1, PAGE_RANK, group.fan_outs[member])
        if self.scales is not None:
            b.mul_(self.scales)
        return b.flatten(1, 2)


class LowRankProducts:
    """Owner of what the layers of a running forward share: x Aᵀ of a group, computed once for all its members."""

    def __init__(self) -> None:
        self._token_counts: Mapping[str, Sequence[int]] = {}
        self._downs: dict[LayerGroup, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin_forward(self, token_counts: Mapping[str, Sequence[int]] = MappingProxyType({})) -> None:
        """Reset before a forward. `token_counts` as in `AdapterBank.route`."""
        self._token_counts = token_counts
        # Left by a forward that was aborted: its inputs are not read again, and take memory.
        self._downs.clear()

    def add_to_linear(
        self, route: Route, group: LayerGroup, member: int, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Add the adapters' products to the output of a Linear, in place."""
        counts = self._token_counts.get(group.names[member])
        if counts is not None:
            # `x` and `output` have the tokens of all rows, one row behind another.
            rows = torch.nn.utils.rnn.pad_sequence(list(torch.split(x, list(counts))), batch_first=True)
            change = torch.bmm(self._down(route, group, member, rows), route.gather_b(group, member))
            return output.add_(torch.cat([row[:count] for row, count in zip(change, counts, strict=True)]))
        tokens = x if x.ndim == 3 else x[:, None]
        down = self._down(route, group, member, tokens)
        flat = output if output.ndim == 3 else output[:, None]
        return flat.baddbmm_(down, route.gather_b(group, member)).view(output.shape)

    def add_to_conv(
        self, route: Route, group: LayerGroup, member: int, x: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Add the adapters' products to the output of a Conv2d, in place."""
        conv = group.modules[member]
        a = route.gather_a(group)
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
            down = torch.bmm(a, x.flatten(2))
        else:
            kernels = a.view(-1, x.shape[1], *conv.kernel_size)
            rows_as_channels = x.reshape(1, -1, *x.shape[2:])
            # One group a row: every row is convolved with the kernels of its own adapters.
            down = functional.conv2d(
                rows_as_channels, kernels, None, conv.stride, conv.padding, conv.dilation, groups=route.num_rows
            ).reshape(route.num_rows, a.shape[1], -1)
        delta = torch.bmm(route.gather_b(group, member).mT, down)
        return output.add_(delta.view(output.shape))

    def _down(self, route: Route, group: LayerGroup, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return x Aᵀ of one member, [rows, tokens, pages a row · PAGE_RANK]; computed for all members at the first."""
        if len(group.names) == 1:
            return torch.bmm(x, route.gather_a(group).mT)
        known = self._downs.pop(group, None)
        if known is None or known[0] is not x:
            known = x, torch.bmm(x, route.gather_a(group).mT)
        if member < len(group.names) - 1:
            self._downs[group] = known
        by_member = known[1].view(*x.shape[:2], -1, len(group.names), PAGE_RANK)
        return by_member[:, :, :, member].flatten(2)
