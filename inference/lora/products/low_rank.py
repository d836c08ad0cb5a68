"""The low-rank products on a CPU: (x Aᵀ) B of each row's own adapters, run by run of rows that have the same.

Rows without an adapter are not touched, and a small rank beside a large one costs what it costs alone. An adapter's
pages are gathered once: on a CPU a gather takes as long as a small product. On a GPU what the kernel does not do comes
here too, and is gathered each time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from inference.lora.layers import LayerGroup
from inference.lora.products.rows import Run


class Weights(NamedTuple):
    """An adapter in one group: `a` [members, rank, in], `b` [rank, out] of each member."""

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]


FindWeights = Callable[[LayerGroup, tuple[int, ...]], Weights]


def gather(group: LayerGroup, pages: tuple[int, ...]) -> Weights:
    """Copy an adapter's A and B out of its pages."""
    a = torch.stack([group.a_pages[page] for page in pages], 1).flatten(1, 2)
    return Weights(a, tuple(torch.cat([of_member[page] for page in pages]) for of_member in group.b_pages))


class GatheredWeights:
    """Owner of the gathered weights of the adapters in slots that rows have had: at most as many bytes as those take in
    the bank."""

    def __init__(self) -> None:
        self._weights: dict[tuple[LayerGroup, tuple[int, ...]], Weights] = {}

    def find(self, group: LayerGroup, pages: tuple[int, ...]) -> Weights:
        """Return the weights of the adapter in these pages, gathered at the first call."""
        key = group, pages
        if key not in self._weights:
            self._weights[key] = gather(group, pages)
        return self._weights[key]

    def forget(self, pages: Sequence[int]) -> None:
        """Drop what was gathered out of these pages, which are written anew."""
        for key in [key for key in self._weights if not set(key[1]).isdisjoint(pages)]:
            del self._weights[key]


class LowRankProducts:
    """The products of the rows' adapters in one group."""

    def __init__(
        self, group: LayerGroup, runs: Sequence[Run], find: FindWeights, token_counts: Sequence[int] | None = None
    ) -> None:
        """`token_counts`: tokens of each row, where the input is [tokens of all rows, in]."""
        self._group = group
        self._find = find
        self._runs = runs
        self._num_rows = sum(run.num_rows for run in runs)
        self._token_counts = None if token_counts is None else _by_run(runs, token_counts)

    def add(self, x: torch.Tensor, outputs: Sequence[torch.Tensor], first: int) -> None:
        """Add the products of `x` to the `outputs` of the layers from the one numbered `first` on, in place.

        ValueError where `x` has other rows than the adapters were routed for.
        """
        check_rows(x, self._num_rows if self._token_counts is None else sum(self._token_counts))
        conv = self._group.conv
        if conv is None:
            num_tokens, own, changed = x.shape[1:-1].numel(), x, outputs
        elif is_pointwise(conv) and outputs[0].is_contiguous(memory_format=torch.channels_last):
            num_tokens, own, changed = x.shape[2:].numel(), as_tokens(x), [as_tokens(outputs[0])]
        else:
            self._add_to_images(conv, x, outputs[0])
            return
        sizes = self._token_counts or [run.num_rows * num_tokens for run in self._runs]
        tokens = [one.view(-1, one.shape[-1]) for one in changed]
        self._add_to_tokens(own.reshape(-1, own.shape[-1]), tokens, first, sizes)

    def _add_to_tokens(self, x: torch.Tensor, outputs: Sequence[torch.Tensor], first: int, sizes: list[int]) -> None:
        """Add to views [tokens, out]; the tokens of each run are `sizes`."""
        parts = [torch.split(output, sizes) for output in outputs]
        last = first + len(outputs)
        for run, own, *changed in zip(self._runs, torch.split(x, sizes), *parts, strict=True):
            for applied in run.adapters:
                weights = self._find(self._group, applied.pages)
                # One product for the A of all layers.
                downs = (own @ weights.a[first:last].flatten(0, 1).mT).chunk(len(outputs), 1)
                for output, down, b in zip(changed, downs, weights.b[first:last], strict=True):
                    output.addmm_(down, b, alpha=applied.scale)

    def _add_to_images(self, conv: torch.nn.Conv2d, x: torch.Tensor, output: torch.Tensor) -> None:
        sizes = [run.num_rows for run in self._runs]
        for run, own, changed in zip(self._runs, torch.split(x, sizes), torch.split(output, sizes), strict=True):
            for applied in run.adapters:
                weights = self._find(self._group, applied.pages)
                kernels = weights.a[0].view(-1, x.shape[1], *conv.kernel_size)
                down = functional.conv2d(own, kernels, None, conv.stride, conv.padding, conv.dilation)
                up = weights.b[0].mT[:, :, None, None]
                changed.add_(functional.conv2d(down, up), alpha=applied.scale)


def _by_run(runs: Sequence[Run], token_counts: Sequence[int]) -> list[int]:
    left = iter(token_counts)
    return [sum(next(left) for _ in range(run.num_rows)) for run in runs]


def check_rows(x: torch.Tensor, num_rows: int) -> None:
    """Raise ValueError unless `x` has the rows, or tokens, that adapters were routed for."""
    if x.shape[0] != num_rows:
        raise ValueError(f"a layer was given {x.shape[0]} rows under adapters that were routed for {num_rows}")


def is_pointwise(conv: torch.nn.Conv2d) -> bool:
    """Return whether the convolution is a product of each pixel by itself."""
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)


def as_tokens(images: torch.Tensor) -> torch.Tensor:
    """Return images [rows, channels, height, width] as tokens [rows, pixels, channels]: a view, in channels_last."""
    return images.flatten(2).mT
