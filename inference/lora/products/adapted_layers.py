"""Layers that add their rows' adapters to their outputs: a model's own Linear and Conv2d, given another class.

Compiled code calls them as one operator, `darkroom::add_low_rank`, which a compiler takes as it is: which adapters a
row has is looked up when it runs, and no trace depends on it.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch


class Products(Protocol):
    """What the adapters of a batch's rows add to the layers of one input."""

    def add(self, x: torch.Tensor, outputs: Sequence[torch.Tensor], first: int) -> None:
        """Add the products of `x` to the `outputs` of the layers from the one numbered `first` on, in place.

        ValueError where `x` has other rows than adapters were set for.
        """


class Group(Protocol):
    """Layers of one input. `products`: of the running forward; None where no row has an adapter of these layers."""

    products: Products | None


_numbers = itertools.count()
_groups: WeakValueDictionary[int, Group] = WeakValueDictionary()


class AdaptedLayer(torch.nn.Module):
    """A layer with adapters, the class of a Linear or Conv2d beside its own; see `adapt`.

    `num_from_here`: the layers of its group from this one on.
    """

    group: Group
    # The group's number, as a tensor: of a number a compiler would make a constant, and of each block another graph.
    place: torch.Tensor
    member: int
    num_from_here: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the adapters of each row of `x` applied."""
        output = self.plain(x)
        _add(self, x, [output])
        return output

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output without adapters."""
        output: torch.Tensor = super().forward(x)
        return output


def adapt(group: Group, modules: Sequence[torch.nn.Module]) -> None:
    """Make `modules`, in order, the adapted layers of `group`; adapted ones change their group."""
    number = next(_numbers)
    _groups[number] = group
    for member, module in enumerate(modules):
        if not isinstance(module, AdaptedLayer):
            kind: Any = type(module)
            module.__class__ = _adapted(kind)
        assert isinstance(module, AdaptedLayer), "its class was changed"  # noqa: S101
        module.group, module.place, module.member = group, torch.tensor(number, device="cpu"), member
        module.num_from_here = len(modules) - member


def project(layers: Sequence[torch.nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the outputs of layers that read one input; their adapters' products are computed together.

    `layers` of one group are given in its order, without a gap.
    """
    first = layers[0]
    if not isinstance(first, AdaptedLayer) or first.num_from_here < len(layers):
        return tuple(layer(x) for layer in layers)
    outputs = [layer.plain(x) for layer in layers if isinstance(layer, AdaptedLayer)]
    _add(first, x, outputs)
    return tuple(outputs)


@cache
def _adapted(kind: Any) -> Any:
    return type(f"Adapted{kind.__name__}", (AdaptedLayer, kind), {})


def _add(first: AdaptedLayer, x: torch.Tensor, outputs: list[torch.Tensor]) -> None:
    if torch.compiler.is_compiling():
        torch.ops.darkroom.add_low_rank(x, outputs, first.place, first.member)
    # Straight to it: the operator's call would take longer than a small layer.
    elif first.group.products is not None:
        first.group.products.add(x, outputs, first.member)


def _add_low_rank(x: torch.Tensor, outputs: list[torch.Tensor], place: torch.Tensor, member: int) -> None:
    products = _groups[int(place)].products
    if products is not None:
        products.add(x, outputs, member)


# Not `custom_op`: its wrapper takes 17 µs a call, this 3.
_library: Any = torch.library.Library("darkroom", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("add_low_rank(Tensor x, Tensor(a!)[] outputs, Tensor place, int member) -> ()")
_library.impl("add_low_rank", _add_low_rank, "CompositeExplicitAutograd")
torch.library.register_fake("darkroom::add_low_rank", lambda x, outputs, place, member: None, lib=_library)
