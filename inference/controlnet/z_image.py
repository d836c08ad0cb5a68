"""What ControlNets add to a Z-Image transformer's forward of many lanes, each lane's own to its own tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from inference.controlnet.guide import Guide
from inference.controlnet.masked_writes import MaskedWrites
from inference.device.uploads import Upload


class Inputs(NamedTuple):
    """The transformer's inputs, by rows: latents [channels, 1, height, width] each, times [rows], captions [tokens,
    width] each, and how many tokens a row has, its picture's and its caption's."""

    latents: Sequence[torch.Tensor]
    times: torch.Tensor
    captions: Sequence[torch.Tensor]
    num_tokens: Sequence[int]


def hints_of(
    guides: Mapping[int, Guide], inputs: Inputs, route_adapters: Callable[[Sequence[int]], None], upload: Upload
) -> dict[int, torch.Tensor]:
    """The hints [rows, tokens, width] by the number of the layer that they are added behind, none where there are no
    `guides`, which are by row. Rows without a guide get zeros.

    A ControlNet runs layers of the transformer itself: `wear` has them apply the adapters of these rows.
    """
    sums: dict[int, torch.Tensor] = {}
    for numbers in _groups(guides):
        route_adapters(numbers)
        rows = upload(numbers).long()
        for layer, hint in _forward([guides[number] for number in numbers], inputs, numbers, rows, upload).items():
            if layer not in sums:
                sums[layer] = hint.new_zeros(len(inputs.latents), max(inputs.num_tokens), hint.shape[2])
            # Behind a row's own tokens it may say anything: nobody reads there.
            sums[layer][rows, : hint.shape[1]] = hint
    return sums


def _groups(guides: Mapping[int, Guide]) -> list[list[int]]:
    """Rows that share a forward, by their ControlNet."""
    groups: dict[Any, list[int]] = {}
    for number, guide in guides.items():
        groups.setdefault(guide.net, []).append(number)
    return list(groups.values())


def _forward(
    guides: Sequence[Guide], inputs: Inputs, numbers: Sequence[int], rows: torch.Tensor, upload: Upload
) -> dict[int, torch.Tensor]:
    net = guides[0].net
    latents = [inputs.latents[number] for number in numbers]
    # Its forward puts the padding in by boolean masks.
    with MaskedWrites():
        hints: dict[int, torch.Tensor] = net(
            latents,
            inputs.times[rows],
            [inputs.captions[number] for number in numbers],
            [_filled(guide.picture, net.config.control_in_dim) for guide in guides],
            # Its dtype decides that of the layers behind it.
            conditioning_scale=upload([guide.scale for guide in guides]).to(latents[0].dtype).view(-1, 1, 1),
        )
    return hints


def _filled(picture: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The encoded picture [channels, 1, height, width]; later ControlNets read a mask and a second picture behind it,
    which are zeros where nothing is repainted."""
    return functional.pad(picture, (0, 0) * 3 + (0, num_channels - len(picture)))
