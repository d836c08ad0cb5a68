"""Facts about torch's operators and their arguments, for a dispatch mode."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch


@cache
def is_composed(func: Any) -> bool:
    """Return whether torch makes the operator of others, and runs no kernel of its own."""
    return bool(func._can_decompose())


def tensors_in(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, torch.Tensor))


def likeness(value: Any) -> Any:
    """Return the traits of an argument that decide an operator's effect."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(likeness, value))
    return type(value), value


def outline(made: Any, args: Sequence[Any]) -> Any:
    """Return the outline of a result from which `FakeCuda._again` makes another."""
    for number, argument in enumerate(args):
        if made is argument:
            return number
    if isinstance(made, list | tuple):
        return [outline(one, args) for one in made]
    return made.shape, made.stride(), made.dtype, made.device


def is_made_of_tensors(made: Any) -> bool:
    return all(isinstance(one, torch.Tensor) for one in (made if isinstance(made, list | tuple) else [made]))


def is_on_device(made: Any, args: Sequence[Any]) -> bool:
    return any(one.device.type == "cuda" for one in tensors_in((made, *args)))


def is_mask(index: Any) -> bool:
    return index is not None and index.dtype in {torch.bool, torch.uint8}
