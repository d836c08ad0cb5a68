"""Hints of ControlNets in a Z-Image transformer's forward of many lanes, each lane's own in its own tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from inference.controlnet.guide import Guide, group_rows
from inference.controlnet.masked_writes import MaskedWrites
from inference.device.uploads import Upload


class Inputs(NamedTuple):
    """The transformer's inputs by row: latents [channels, 1, height, width] each, times [rows], captions [tokens,
    width] each, and the number of tokens, of image and caption."""

    latents: Sequence[torch.Tensor]
    times: torch.Tensor
    captions: Sequence[torch.Tensor]
    num_tokens: Sequence[int]


def compute_hints(
    guides: Mapping[int, Guide],
    inputs: Inputs,
    route_adapters: Callable[[Sequence[int]], None],
    upload: Upload,
) -> dict[int, torch.Tensor]:
    """Compute the hints [rows, tokens, width] by the layer whose output they are added to; empty without `guides`.

    `guides` are by row; rows without one get zeros. A ControlNet runs layers of the transformer itself:
    `route_adapters` sets the adapters of the rows in its forward.
    """
    sums: dict[int, torch.Tensor] = {}
    for numbers in group_rows(guides, lambda _, guide: guide.net):
        route_adapters(numbers)
        rows = upload(numbers).long()
        for layer, hint in _forward([guides[number] for number in numbers], inputs, numbers, rows, upload).items():
            if layer not in sums:
                sums[layer] = hint.new_zeros(len(inputs.latents), max(inputs.num_tokens), hint.shape[2])
            # Behind a row's own tokens the values do not matter: they are not read.
            sums[layer][rows, : hint.shape[1]] = hint
    return sums


def _forward(
    guides: Sequence[Guide], inputs: Inputs, numbers: Sequence[int], rows: torch.Tensor, upload: Upload
) -> dict[int, torch.Tensor]:
    net = guides[0].net
    num_channels = net.config.control_in_dim
    latents = [inputs.latents[number] for number in numbers]
    # Its forward writes the padding through boolean masks.
    with MaskedWrites():
        hints: dict[int, torch.Tensor] = net(
            latents,
            inputs.times[rows],
            [inputs.captions[number] for number in numbers],
            # [channels, 1, height, width]. Later ControlNets read a mask and a second image, zeros without inpainting.
            [functional.pad(one.image, (0, 0) * 3 + (0, num_channels - len(one.image))) for one in guides],
            # Its dtype decides that of the layers after it.
            conditioning_scale=upload([guide.scale for guide in guides]).to(latents[0].dtype).view(-1, 1, 1),
        )
    return hints
