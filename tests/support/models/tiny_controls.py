"""Tiny random ControlNets whose say is loud, pictures for them to follow, and what plain diffusers draws with them."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ControlNetModel, ZImageControlNetModel
from PIL import Image

from inference.request import Control, GenerationRequest
from tests.support.images.parity import pipe_with
from tests.support.models.plain_families import DEFAULTS, DIFFUSION_CHOICES

# A new ControlNet's last layers are zeros: it says nothing yet.
SILENT = ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
SILENT_IN_Z_IMAGE = ("before_proj", "after_proj")


def write_controlnet(folder: Path, pipe: Any, *, seed: int = 0, **config: Any) -> Path:
    """Write a ControlNet made for the pipeline's denoiser, with these changes of its config, and return `folder`."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if isinstance(pipe, diffusers.ZImagePipeline):
            net = _z_image_controlnet(**config)
        else:
            net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 16))
            net.register_to_config(**config)
        for name, weight in net.named_parameters():
            if name.startswith(SILENT):
                weight.normal_()
            elif any(part in name for part in SILENT_IN_Z_IMAGE):
                weight.normal_(std=0.3)
    net.save_pretrained(folder)
    return folder


def _z_image_controlnet(**config: Any) -> ZImageControlNetModel:
    """Build it as the second version of Z-Image's: for inpainting too, and with refiners of its own."""
    usual: dict[str, Any] = {
        "control_layers_places": [0, 1],
        "control_refiner_layers_places": [0],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_noise_refiner",
    }
    return ZImageControlNetModel(dim=64, n_refiner_layers=1, n_heads=2, n_kv_heads=2, **usual | config)


def square(left: int, top: int, side: int, *, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw a white square on black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[top : top + side, left : left + side] = 255
    return Image.fromarray(pixels)


def speckles(seed: int, *, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def control_of(model: str, image: Image.Image, **fields: Any) -> Control:
    return Control(model, image.tobytes(), **fields)


def plainly_controlled(
    checkpoint: Path, controlnet: Path, request: GenerationRequest, shown: Image.Image
) -> Image.Image:
    """Generate the request alone with plain diffusers, this ControlNet and this control image."""
    plain = pipe_with(checkpoint, *request.adapters)
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator().manual_seed(request.seeds[0]),
    }
    assert request.control is not None
    arguments["controlnet_conditioning_scale"] = request.control.scale
    if isinstance(plain, diffusers.ZImagePipeline):
        pipe = _with(ZImageControlNetModel, "ZImageControlNetPipeline", plain, controlnet)
        arguments["control_image"] = shown
    else:
        pipe = _with(ControlNetModel, _pipeline_for(plain, request), plain, controlnet)
        choice = DIFFUSION_CHOICES[request.scheduler or DEFAULTS[type(plain).__name__]]
        pipe.scheduler = choice.scheduler.from_config(pipe.scheduler.config, **choice.changes)
        arguments |= {"control_guidance_start": request.control.start, "control_guidance_end": request.control.end}
        arguments |= _images(request, shown)
    return pipe(**arguments).images[0]  # type: ignore[no-any-return]


def _pipeline_for(plain: Any, request: GenerationRequest) -> str:
    """Choose diffusers' UNet pipeline with a ControlNet for the request's kind."""
    family = "StableDiffusionXL" if hasattr(plain, "text_encoder_2") else "StableDiffusion"
    kind = {"text2image": "", "image2image": "Img2Img", "inpaint": "Inpaint"}[request.kind]
    return f"{family}ControlNet{kind}Pipeline"


def _images(request: GenerationRequest, shown: Image.Image) -> dict[str, Any]:
    source = request.source
    if source is None:
        return {"image": shown}
    size = (request.width, request.height)
    images = {"image": Image.frombytes("RGB", size, source.rgb), "control_image": shown, "strength": source.strength}
    if source.mask is not None:
        images["mask_image"] = Image.frombytes("L", size, source.mask)
    return images


def _with(net: Any, pipeline: str, plain: Any, folder: Path) -> Any:
    """Put the plain pipeline's parts and a ControlNet into a pipeline of another class."""
    loaded = net.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe = getattr(diffusers, pipeline).from_pipe(plain, controlnet=loaded, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
