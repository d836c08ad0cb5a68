"""The trained parts as an ordinary diffusers folder, in fp16."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from examples.demo_model.recipe.denoiser import build_scheduler
from examples.demo_model.recipe.settings import Workspace

MAX_CHECKPOINT_BYTES = 16_000_000


class TooLarge(Exception):
    """The checkpoint is larger than the repository may hold."""


def export(workspace: Workspace) -> dict[str, object]:
    """Leave the checkpoint, ready for `StableDiffusionPipeline.from_pretrained`."""
    half = torch.float16
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(workspace.trained("vae_normalised"), dtype=half),
        text_encoder=CLIPTextModel.from_pretrained(workspace.trained("text_encoder"), dtype=half),
        tokenizer=CLIPTokenizer.from_pretrained(workspace.trained("tokenizer")),
        unet=UNet2DConditionModel.from_pretrained(workspace.trained("unet"), dtype=half),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(workspace.checkpoint)
    # diffusers writes a tokenizer without the two files that other readers of CLIP's tokenizers ask for.
    pipeline.tokenizer.backend_tokenizer.model.save(str(workspace.checkpoint / "tokenizer"))
    size = bytes_in(workspace.checkpoint)
    if size > MAX_CHECKPOINT_BYTES:
        raise TooLarge(f"{workspace.checkpoint} has {size} bytes")
    parts = {part.name: bytes_in(part) for part in sorted(workspace.checkpoint.iterdir()) if part.is_dir()}
    return {"bytes": size, "parts": parts}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
