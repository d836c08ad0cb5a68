"""Layout of the bank's pages: the model's layers, grouped by the input they read, and slabs of their pages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from inference.lora.adapter import LowRank, weight_shape
from inference.lora.products.adapted_layers import Products

# Half of this is wasted on average by an adapter whose rank is no multiple of it.
PAGE_RANK = 8
# Layers of one input, whose A are one product where the model projects them together; diffusers' names, FLUX.1's for
# text among them, then CLIP's.
SELF_ATTENTION = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
CROSS_ATTENTION = (("to_q",), ("to_k", "to_v"))
# Z-Image's feed-forward: the gated layer and its gate.
GATED = ("w1", "w3")
# The modules that attention layers belong to, by diffusers' names and CLIP's.
ATTENTIONS = frozenset({"attn", "attn1", "attn2", "self_attn", "attention"})


class Slab:
    """The pages of layer groups of one kind that one adapter was the first to touch: one tensor [pages, width], which
    is not moved while there are adapters in it."""

    def __init__(self, groups: Sequence["LayerGroup"]) -> None:
        self.groups = tuple(groups)
        self.width = 0
        self.pages: torch.Tensor | None = None
        for group in groups:
            group.slab, group.start = self, self.width
            self.width += group.width

    def allocate(self, pages: torch.Tensor) -> None:
        """Use `pages`, all zero, as the slab's memory."""
        self.pages = pages
        for group in self.groups:
            # Views made once: every gather begins with one.
            group.a_pages = group.a_part(pages)
            group.b_pages = [group.b_part(pages, member) for member in range(len(group.names))]

    def free(self) -> None:
        """Free the slab's memory. What was in its pages is lost, and it may be allocated again."""
        if self.pages is None:
            return
        self.pages = None
        for group in self.groups:
            del group.a_pages, group.b_pages


@dataclass(eq=False)
class LayerGroup:
    """Layers of one input. `start`: offset of its part in its slab's pages, the A of all members, then the B of each.

    `slab` is set once an adapter that touches them is laid out, `a_pages` [pages, members, PAGE_RANK, in] and `b_pages`
    [pages, PAGE_RANK, out] of each member once the slab is allocated. `products`: of the adapters that are routed;
    None where none touches the layers.
    """

    names: tuple[str, ...]
    modules: tuple[Any, ...]
    start: int = -1
    slab: Slab = field(init=False)
    a_pages: torch.Tensor = field(init=False)
    b_pages: list[torch.Tensor] = field(init=False)
    products: Products | None = None

    @cached_property
    def conv(self) -> torch.nn.Conv2d | None:
        """The convolution that is the group; None for Linear layers."""
        module = self.modules[0]
        return module if isinstance(module, torch.nn.Conv2d) else None

    @cached_property
    def fan_in(self) -> int:
        return math.prod(weight_shape(self.modules[0])[1:])

    @cached_property
    def fan_outs(self) -> tuple[int, ...]:
        return tuple(weight_shape(module)[0] for module in self.modules)

    @cached_property
    def a_width(self) -> int:
        return len(self.names) * PAGE_RANK * self.fan_in

    @property
    def width(self) -> int:
        return self.a_width + PAGE_RANK * sum(self.fan_outs)

    def a_part(self, pages: torch.Tensor) -> torch.Tensor:
        """Return the A in the slab's pages, a view [pages, members, PAGE_RANK, in]."""
        part = pages[:, self.start : self.start + self.a_width]
        return part.view(-1, len(self.names), PAGE_RANK, self.fan_in)

    def b_part(self, pages: torch.Tensor, member: int) -> torch.Tensor:
        """Return the member's B in the slab's pages, a view [pages, PAGE_RANK, out]."""
        start = self.b_start(member)
        part = pages[:, start : start + PAGE_RANK * self.fan_outs[member]]
        return part.view(-1, PAGE_RANK, self.fan_outs[member])

    def a_start(self, member: int) -> int:
        """Return the offset of the member's A in a page, [PAGE_RANK, in]."""
        return self.start + member * PAGE_RANK * self.fan_in

    def b_start(self, member: int) -> int:
        """Return the offset of the member's B in a page, [PAGE_RANK, out]."""
        return self.start + self.a_width + PAGE_RANK * sum(self.fan_outs[:member])


def layer_groups(models: Mapping[str, torch.nn.Module]) -> list[LayerGroup]:
    """Group every Linear and Conv2d of the models by the input they read."""
    layers = {
        f"{model}.{name}": module
        for model, root in models.items()
        for name, module in root.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    attentions = [
        (f"{model}.{name}.", bool(getattr(module, "is_cross_attention", False)))
        for model, root in models.items()
        for name, module in root.named_modules()
    ]
    groups: list[LayerGroup] = []
    for prefix, is_cross in attentions:
        for members in CROSS_ATTENTION if is_cross else (*SELF_ATTENTION, GATED):
            names = tuple(prefix + member for member in members)
            if all(name in layers for name in names):
                groups.append(LayerGroup(names, tuple(layers.pop(name) for name in names)))
    return groups + [LayerGroup((name,), (module,)) for name, module in layers.items()]


def by_kind(groups: Sequence[LayerGroup]) -> list[list[LayerGroup]]:
    """Split the groups by model and by the kinds that adapters train as a whole: attention, convolutions, the rest."""
    kinds: dict[tuple[str, bool, bool], list[LayerGroup]] = {}
    for group in groups:
        model, *path = group.names[0].split(".")
        kind = model, not ATTENTIONS.isdisjoint(path), isinstance(group.modules[0], torch.nn.Conv2d)
        kinds.setdefault(kind, []).append(group)
    return list(kinds.values())


def fill(pages: torch.Tensor, group: LayerGroup, member: int, layer: LowRank) -> None:
    """Write a layer's A and B into their parts of a slab's pages; beyond its rank the pages stay zero."""
    a = layer.a.flatten(1)
    b = layer.b.flatten(1).T
    num_full, rest = divmod(layer.rank, PAGE_RANK)
    for part, weight in ((group.a_part(pages)[:, member], a), (group.b_part(pages, member), b)):
        full = num_full * PAGE_RANK
        # A view, not a reshape: that would first copy the transposed B.
        part[:num_full] = weight[:full].view(num_full, PAGE_RANK, weight.shape[1])
        if rest:
            part[num_full, :rest] = weight[full:]


def zeros(num_pages: int, width: int, *, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Allocate [num_pages, width] of zeros; on a CPU they take memory only as they are written."""
    if device.type != "cpu":
        return torch.zeros(num_pages, width, device=device, dtype=dtype)
    try:
        # numpy leaves large zeros to the kernel. torch.zeros would write all of them.
        blank = np.zeros(num_pages * width * dtype.itemsize, np.uint8)
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from error
    return torch.from_numpy(blank).view(dtype).view(num_pages, width)


def split(pages: torch.Tensor, slabs: Sequence[Slab], num_pages: int) -> dict[Slab, torch.Tensor]:
    """Split `pages` [elements], the slabs' parts in order, into views [num_pages, width]."""
    own = torch.split(pages, [num_pages * slab.width for slab in slabs])
    return {slab: part.view(num_pages, slab.width) for slab, part in zip(slabs, own, strict=True)}
