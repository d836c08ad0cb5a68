"""Checkpoints of several sizes with random weights, and adapters for them: made here, nothing is downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.support.models.tiny_models import MAX_TOKENS, byte_tokenizer

DEMO_MODEL = Path(__file__).parent.parent / "examples" / "demo_model"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL_LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


class AdapterKind(NamedTuple):
    """The layers an adapter changes: all linear layers of the denoiser or only attention, and text encoders or not."""

    rank: int
    is_all_linear: bool = False
    has_text: bool = False


# The adapters of ten jobs. The last job but one has none, the last has two.
ADAPTERS = (
    AdapterKind(4),
    AdapterKind(8),
    AdapterKind(16),
    AdapterKind(32),
    AdapterKind(8, is_all_linear=True),
    AdapterKind(16, is_all_linear=True),
    AdapterKind(4, has_text=True),
    AdapterKind(16, is_all_linear=True, has_text=True),
)


@dataclass(frozen=True, slots=True)
class Size:
    """A Stable Diffusion 1.x of some width; `pixels` is its image side."""

    pixels: int
    unet_widths: tuple[int, ...]
    text_width: int
    text_layers: int
    vae_widths: tuple[int, ...]
    layers_per_block: int = 2
    vae_layers_per_block: int = 1


SIZES = {
    "tiny": Size(64, (32, 64, 64), 32, 2, (8, 8, 16, 16), layers_per_block=1),
    "35m": Size(128, (112, 208, 416), 256, 4, (32, 64, 64, 64), layers_per_block=1),
    # runwayml's configs: UNet 860 M, text encoder 123 M, VAE 84 M parameters.
    "sd15": Size(512, (320, 640, 1280, 1280), 768, 12, (128, 256, 512, 512), vae_layers_per_block=2),
}


def build(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write the checkpoint called `name` in SIZES; random but seeded."""
    size = SIZES[name]
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    pipe = StableDiffusionPipeline(
        unet=_unet(size),
        text_encoder=_text_encoder(size, tokenizer),
        tokenizer=tokenizer,
        vae=_vae(size),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype)
    pipe.save_pretrained(folder)
    return folder


def _unet(size: Size) -> UNet2DConditionModel:
    num_levels = len(size.unet_widths)
    return UNet2DConditionModel(
        sample_size=size.pixels // 8,
        block_out_channels=size.unet_widths,
        layers_per_block=size.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * (num_levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (num_levels - 1),
        cross_attention_dim=size.text_width,
        attention_head_dim=8,
        norm_num_groups=8 if num_levels == 3 else 32,
    )


def _text_encoder(size: Size, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408 if size.text_width == 768 else len(tokenizer),
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=max(2, size.text_width // 64),
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=size.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=size.vae_layers_per_block,
        norm_num_groups=4 if size.vae_widths[0] < 32 else 32,
        latent_channels=4,
        sample_size=size.pixels,
    )


def write_adapter(
    path: Path, pipe: StableDiffusionPipeline, *, rank: int, targets: Sequence[str], seed: int, has_text: bool = False
) -> Path:
    """Write a random adapter in diffusers' format, strong enough to change every image."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    wanted = [("unet", pipe.unet, tuple(targets))] + ([("text_encoder", pipe.text_encoder, TEXT_LAYERS)] * has_text)
    for model, root, endings in wanted:
        for name, module in root.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(endings):
                down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
                up = torch.randn(module.out_features, rank, generator=generator) * 0.5 * rank**-0.5
                state[f"{model}.{name}.lora_A.weight"] = down.to(module.weight.dtype).contiguous()
                state[f"{model}.{name}.lora_B.weight"] = up.to(module.weight.dtype).contiguous()
    safetensors.torch.save_file(state, path)
    return path
