"""Tiny random ControlNets whose say is loud, pictures for them to follow, and what plain diffusers draws with them."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image

from inference.request import Control, GenerationRequest
from tests.pictures import pipe_with
from tests.plain_families import DEFAULTS, DIFFUSION_CHOICES

# Of diffusers' own pipelines, by the one that a checkpoint names.
PIPELINES = {
    "StableDiffusionPipeline": diffusers.StableDiffusionControlNetPipeline,
    "StableDiffusionXLPipeline": diffusers.StableDiffusionXLControlNetPipeline,
}
# A new ControlNet's last layers are zeros: it says nothing yet.
SILENT = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")


def write_controlnet(folder: Path, pipe: Any, *, seed: int = 0, **config: Any) -> Path:
    """Writes a ControlNet made for the pipeline's UNet and returns `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 16))
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if name.startswith(SILENT):
                    weight.normal_()
    net.register_to_config(**config)
    net.save_pretrained(folder)
    return folder


def square(left: int, top: int, side: int, *, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A white square on black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[top : top + side, left : left + side] = 255
    return Image.fromarray(pixels)


def speckles(seed: int, *, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def control_of(model: str, picture: Image.Image, **fields: Any) -> Control:
    return Control(model, picture.tobytes(), **fields)


def plainly_controlled(
    checkpoint: Path, controlnet: Path, request: GenerationRequest, shown: Image.Image
) -> Image.Image:
    """What plain diffusers draws for the request alone with this ControlNet, which is shown this picture."""
    plain = pipe_with(checkpoint, *request.adapters)
    net = ControlNetModel.from_pretrained(controlnet, dtype=torch.float32, local_files_only=True)
    name = type(plain).__name__
    choice = DIFFUSION_CHOICES[request.scheduler or DEFAULTS[name]]
    pipe: Any = PIPELINES[name].from_pipe(plain, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = choice.scheduler.from_config(pipe.scheduler.config, **choice.changes)
    control = request.control
    assert control is not None
    drawn = pipe(
        request.prompt,
        image=shown,
        negative_prompt=request.negative_prompt or None,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        controlnet_conditioning_scale=control.scale,
        control_guidance_start=control.start,
        control_guidance_end=control.end,
        generator=torch.Generator().manual_seed(request.seeds[0]),
    )
    return drawn.images[0]  # type: ignore[no-any-return]
