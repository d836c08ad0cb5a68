"""The three families as their publishers configure them, and tiny ones of the same build."""

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3Model

from tests.support.models.tiny_models import BETAS, byte_tokenizer, chat_tokenizer

TINY_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
}
SDXL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def _sd15(*, is_tiny: bool) -> Any:
    """Build the configs of runwayml's: UNet 860 M, text encoder 123 M, VAE 84 M parameters."""
    tokenizer = byte_tokenizer()
    full: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
    tiny = {"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, **TINY_UNET}
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**(tiny if is_tiny else full)),
        text_encoder=CLIPTextModel(_clip(tokenizer, is_tiny=is_tiny, layers=12, heads=12, width=768)),
        tokenizer=tokenizer,
        vae=_vae(is_tiny=is_tiny, sample_size=512),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(*, is_tiny: bool) -> Any:
    """Build the configs of stabilityai's: UNet 2.6 B, text encoders 123 M and 695 M, VAE 84 M parameters."""
    tokenizer, tokenizer_2 = byte_tokenizer(), byte_tokenizer(pad_token="!")  # noqa: S106 - of text
    full: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    tiny: dict[str, Any] = {
        **TINY_UNET,
        "sample_size": 8,
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 2, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    second = _clip(tokenizer_2, is_tiny=is_tiny, layers=32, heads=20, width=1280, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            **{**(tiny if is_tiny else full), **SDXL_BLOCKS},
            use_linear_projection=True,
            addition_embed_type="text_time",
        ),
        text_encoder=CLIPTextModel(_clip(tokenizer, is_tiny=is_tiny, layers=12, heads=12, width=768)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        vae=_vae(is_tiny=is_tiny, sample_size=1024, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _z_image(*, is_tiny: bool) -> Any:
    """Build the configs of Tongyi-MAI's: transformer 6.2 B, language model 4 B, VAE 84 M parameters."""
    tokenizer = chat_tokenizer()
    tiny_transformer = {
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1024, 128, 128],
    }
    full = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    tiny = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = (2, 1, 16) if is_tiny else (32, 8, 128)
    counts = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**(tiny_transformer if is_tiny else {})),
        text_encoder=Qwen3Model(
            Qwen3Config(
                **{**(tiny if is_tiny else full), **counts},
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        vae=_vae(
            is_tiny=is_tiny,
            sample_size=1024,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )


def _clip(tokenizer: Any, *, is_tiny: bool, layers: int, heads: int, width: int, hidden_act: str = "quick_gelu") -> Any:
    sizes = (2, 2, 32, len(tokenizer)) if is_tiny else (layers, heads, width, 49408)
    num_layers, num_heads, hidden, vocabulary = sizes
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(*, is_tiny: bool, sample_size: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16) if is_tiny else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if is_tiny else 2,
        norm_num_groups=4 if is_tiny else 32,
        sample_size=64 if is_tiny else sample_size,
        **config,
    )


BUILDERS: dict[str, Callable[..., Any]] = {"sd15": _sd15, "sdxl": _sdxl, "z-image": _z_image}
