"""Identify whole checkpoints in one file by the tensor names of the original training code."""

from collections.abc import Mapping

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
# In Z-Image's own layout, with or without ComfyUI's prefix, and in diffusers'.
Z_IMAGE_MARKS = ("cap_embedder.0.weight", "layers.0.attention.qkv.weight", "layers.0.attention.to_q.weight")
FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
LATENT_CHANNELS = 4
# The latents, a mask, and the masked image's latents.
INPAINTING_CHANNELS = 2 * LATENT_CHANNELS + 1


def family_of(shapes: Shapes, subject: str) -> str:
    """Return the pipeline class of the tensors; EngineStartFailed, about `subject`, where there is none."""
    if any(name.endswith(Z_IMAGE_MARKS) for name in shapes):
        raise EngineStartFailed(
            f"{subject} is a Z-Image transformer, which alone is no whole checkpoint: name a diffusers folder"
        )
    found = next((name for name in PREFIXES if all(split(shapes, name).values())), None)
    if found is None:
        raise EngineStartFailed(
            f"{subject} is no Stable Diffusion 1.x, 2.x or XL with UNet, VAE and text encoder in one file:"
            " name a whole checkpoint or a diffusers folder"
        )
    _, channels, *_ = shapes.get(FIRST_CONVOLUTION, (0, LATENT_CHANNELS))
    if channels not in (LATENT_CHANNELS, INPAINTING_CHANNELS):
        raise EngineStartFailed(
            f"{subject} is for editing or upscaling ({channels} input channels); this version runs ordinary and"
            " inpainting checkpoints"
        )
    return found


def split(shapes: Shapes, pipeline_class: str) -> Mapping[str, Shapes]:
    """Split the tensors by component."""
    return {
        component: {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        for component, prefix in PREFIXES[pipeline_class].items()
    }
