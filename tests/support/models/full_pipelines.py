"""diffusers pipelines and ControlNets of the sizes that are published: structure without memory."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    ZImageControlNetModel,
)
from transformers import CLIPTextModel, Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel

from benchmarks.gpu.models.bench_model import model_of
from tests.support.models.tiny_flux import letter_tokenizer
from tests.support.models.tiny_models import byte_tokenizer, chat_tokenizer, clip_config


def build_pipeline(name: str) -> Any:
    """Build the family's pipeline of meta tensors; for "sd15-inpaint" with a UNet that reads a mask and a masked
    image.
    """
    if name == "flux":
        return _flux()
    if name == "klein":
        return _klein()
    pipeline = model_of(name.removesuffix("-inpaint"), is_tiny=False).build_without_memory()
    if not name.endswith("-inpaint"):
        return pipeline
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    parts = {**pipeline.components, "unet": unet}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def _flux() -> Any:
    """Build the configs of FLUX.1 dev: transformer 11.9 B, T5 4.8 B, CLIP 123 M, VAE 84 M parameters."""
    tokenizer, tokenizer_2 = byte_tokenizer(), letter_tokenizer()
    clip = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 49408}
    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    latents = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                sample_size=1024,
                use_quant_conv=False,
                use_post_quant_conv=False,
                **blocks,
                **latents,
            ),
            text_encoder=CLIPTextModel(clip_config(tokenizer, num_hidden_layers=12, **clip)),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
            tokenizer_2=tokenizer_2,
            transformer=FluxTransformer2DModel(guidance_embeds=True),
        )


def _klein() -> Any:
    """Build the configs of FLUX.2 klein 4B: transformer 3.9 B, Qwen3 4.0 B, VAE 84 M parameters."""
    blocks = {"num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24}
    qwen = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=AutoencoderKLFlux2(block_out_channels=(128, 256, 512, 512)),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**qwen, **heads, tie_word_embeddings=True)),
            tokenizer=chat_tokenizer(),
            transformer=Flux2Transformer2DModel(**blocks, joint_attention_dim=7680, guidance_embeds=False),
        )


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
