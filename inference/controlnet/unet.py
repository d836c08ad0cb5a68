"""Residuals of ControlNets in a UNet's forward of many lanes, each lane's own in its own rows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from inference.controlnet.guide import Guide, group_rows
from inference.device.uploads import Upload


class Inputs(NamedTuple):
    """A UNet's inputs by row: latents [rows, channels, height, width], timesteps [rows], each row's prompt embedding
    [tokens, width], and the added conditions."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompts: Sequence[torch.Tensor]
    added: Mapping[str, torch.Tensor]

    def pick(self, numbers: Sequence[int], rows: torch.Tensor) -> "Inputs":
        """Return the inputs of these rows: `numbers` on the host, the same as `rows` on the device."""
        return Inputs(
            latents=self.latents[rows],
            timesteps=self.timesteps[rows],
            prompts=[self.prompts[number] for number in numbers],
            added={name: one[rows] for name, one in self.added.items()},
        )


def compute_residuals(guides: Mapping[int, Guide], inputs: Inputs, upload: Upload) -> dict[str, Any]:
    """Compute the residuals by the names of the UNet's parameters; empty without `guides`, which are by row.

    Rows without a guide get zeros. Rows share a forward by ControlNet and length of the prompt: a ControlNet takes no
    mask to hide padding.
    """
    num_rows = len(inputs.latents)
    sums: list[torch.Tensor] = []
    for numbers in group_rows(guides, lambda number, guide: (guide.net, len(inputs.prompts[number]))):
        rows = upload(numbers).long()
        residuals = _forward([guides[number] for number in numbers], inputs.pick(numbers, rows), upload)
        sums = sums or [_zeros(num_rows, one, inputs.latents.dtype) for one in residuals]
        for whole, part in zip(sums, residuals, strict=True):
            whole[rows] = part.to(whole.dtype)
    if not sums:
        return {}
    return {"down_block_additional_residuals": tuple(sums[:-1]), "mid_block_additional_residual": sums[-1]}


def _forward(guides: Sequence[Guide], inputs: Inputs, upload: Upload) -> list[torch.Tensor]:
    """Return the residuals of rows with these guides, all of one ControlNet; those of the middle block are the last."""
    net = guides[0].net
    down, middle = net(
        # The extra channels of an inpainting UNet are not for the ControlNet.
        inputs.latents[:, : net.config.in_channels],
        inputs.timesteps,
        torch.stack(list(inputs.prompts)),
        controlnet_cond=torch.stack([guide.image for guide in guides]),
        conditioning_scale=upload([guide.scale for guide in guides]).view(-1, 1, 1, 1),
        added_cond_kwargs=dict(inputs.added),
        return_dict=False,
    )
    return [*down, middle]


def _zeros(num_rows: int, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Allocate zeros like `part`, for `num_rows`, in the memory format that convolutions left."""
    is_channels_last = part.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty((num_rows, *part.shape[1:]), device=part.device, dtype=dtype, memory_format=form).zero_()
