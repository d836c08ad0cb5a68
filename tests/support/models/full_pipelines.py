"""diffusers pipelines and ControlNets of the sizes that are published: structure without memory."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionInpaintPipeline, UNet2DConditionModel, ZImageControlNetModel

from benchmarks.gpu.models.bench_model import model_of


def build_pipeline(name: str) -> Any:
    """Build the family's pipeline of meta tensors; for "sd15-inpaint" with a UNet that reads a mask and a masked
    image.
    """
    pipeline = model_of(name.removesuffix("-inpaint"), is_tiny=False).build_without_memory()
    if not name.endswith("-inpaint"):
        return pipeline
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    parts = {**pipeline.components, "unet": unet}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def _unet_controlnet(unet: Any) -> Any:
    shared = ("cross_attention_dim", "block_out_channels", "layers_per_block", "attention_head_dim", "down_block_types")
    more = ("transformer_layers_per_block", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim")
    names = (*shared, *more, "projection_class_embeddings_input_dim")
    with torch.device("meta"):
        return ControlNetModel(**{name: unet.config[name] for name in names})


def _z_image_controlnet(_: Any) -> Any:
    """Build it as the second version of Z-Image's union ControlNet."""
    with torch.device("meta"):
        return ZImageControlNetModel(
            control_layers_places=list(range(0, 30, 2)),
            control_refiner_layers_places=[0, 1],
            control_in_dim=33,
            add_control_noise_refiner="control_noise_refiner",
        )


CONTROLNETS: dict[str, Callable[[Any], Any]] = {
    "sd15": _unet_controlnet,
    "sdxl": _unet_controlnet,
    "z-image": _z_image_controlnet,
}
