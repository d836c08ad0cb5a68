"""Identify checkpoints in one file by the tensor names of the original training code, and of ComfyUI."""

from collections.abc import Iterable, Mapping
from typing import Any

from inference.checkpoints.weight_files import Shapes
from inference.errors import EngineStartFailed

PREFIXES = {
    "StableDiffusionXLPipeline": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
    },
    "StableDiffusionPipeline": {
        "text_encoder": "cond_stage_model.",
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
    },
}
Z_IMAGE = "ZImagePipeline"
# As ComfyUI saves a checkpoint. Its transformer is published alone too, with or without the prefix.
Z_IMAGE_PREFIXES = {
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
}
# In Z-Image's own layout and in diffusers'.
Z_IMAGE_MARKS = ("cap_embedder.0.weight", "layers.0.attention.qkv.weight", "layers.0.attention.to_q.weight")
# Behind the name of the layer whose weight they are of, as ComfyUI writes them now and wrote them before.
SCALES = (".weight_scale", ".scale_weight")
FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
LATENT_CHANNELS = 4
# The latents, a mask, and the masked image's latents.
INPAINTING_CHANNELS = 2 * LATENT_CHANNELS + 1


def family_of(shapes: Shapes, subject: str) -> str:
    """Return the pipeline class of the tensors; EngineStartFailed, about `subject`, where there is none."""
    if any(name.endswith(Z_IMAGE_MARKS) for name in shapes):
        return Z_IMAGE
    found = next((name for name in PREFIXES if all(split(shapes, name).values())), None)
    if found is None:
        raise EngineStartFailed(
            f"{subject} is no Stable Diffusion 1.x, 2.x or XL with UNet, VAE and text encoder in one file, and no"
            " Z-Image: name a whole checkpoint or a diffusers folder"
        )
    if is_scaled(shapes):
        raise EngineStartFailed(
            f"{subject} has float8 weights with scales, which this version reads of Z-Image alone: name a file without"
        )
    _, channels, *_ = shapes.get(FIRST_CONVOLUTION, (0, LATENT_CHANNELS))
    if channels not in (LATENT_CHANNELS, INPAINTING_CHANNELS):
        raise EngineStartFailed(
            f"{subject} is for editing or upscaling ({channels} input channels); this version runs ordinary and"
            " inpainting checkpoints"
        )
    return found


def split(shapes: Mapping[str, Any], pipeline_class: str) -> Mapping[str, dict[str, Any]]:
    """Split the tensors by component, with their whole names. Of Z-Image a component may have none."""
    if pipeline_class == Z_IMAGE:
        parts = {component: _under(prefix, shapes) for component, prefix in Z_IMAGE_PREFIXES.items()}
        if not parts["transformer"]:
            others = parts["text_encoder"].keys() | parts["vae"].keys()
            parts["transformer"] = {name: one for name, one in shapes.items() if name not in others}
        return parts
    return {component: _under(prefix, shapes) for component, prefix in PREFIXES[pipeline_class].items()}


def is_scaled(names: Iterable[str]) -> bool:
    """Return whether weights among these tensors have scales."""
    return any(name.endswith(SCALES) for name in names)


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in tensors.items() if name.startswith(prefix)}
