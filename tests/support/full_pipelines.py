"""diffusers pipelines and ControlNets of the sizes that are published, of meta tensors: structure without memory."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImageControlNetModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3Model

from tests.tiny_models import BETAS, byte_tokenizer, chat_tokenizer

CLIP_VOCABULARY = 49408


def _sd15(pipeline: Any = StableDiffusionPipeline) -> Any:
    """As runwayml's configs have it."""
    tokenizer = byte_tokenizer()
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(
                sample_size=64,
                in_channels=9 if pipeline is StableDiffusionInpaintPipeline else 4,
                cross_attention_dim=768,
            ),
            "text_encoder": CLIPTextModel(_clip_config(tokenizer, 768, num_hidden_layers=12, num_attention_heads=12)),
            "vae": _vae(sample_size=512),
        }
    return pipeline(
        **models,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(pipeline: Any = StableDiffusionXLPipeline) -> Any:
    """As stabilityai's configs have it."""
    tokenizer, tokenizer_2 = byte_tokenizer(), byte_tokenizer(pad_token="!")
    second = {"num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(
                sample_size=128,
                in_channels=9 if pipeline is StableDiffusionXLInpaintPipeline else 4,
                block_out_channels=(320, 640, 1280),
                transformer_layers_per_block=(1, 2, 10),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "text_encoder": CLIPTextModel(_clip_config(tokenizer, 768, num_hidden_layers=12, num_attention_heads=12)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip_config(tokenizer_2, 1280, **second)),
            "vae": _vae(sample_size=1024, scaling_factor=0.13025),
        }
    return pipeline(
        **models,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _z_image() -> Any:
    """As Tongyi-MAI's configs have it: a Qwen3 of 4 B parameters before a transformer of 6 B."""
    tokenizer = chat_tokenizer()
    with torch.device("meta"):
        models = {
            "transformer": ZImageTransformer2DModel(),
            "text_encoder": Qwen3Model(
                Qwen3Config(
                    hidden_size=2560,
                    intermediate_size=9728,
                    num_hidden_layers=36,
                    num_key_value_heads=8,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            "vae": _vae(
                sample_size=1024,
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    return ZImagePipeline(**models, tokenizer=tokenizer, scheduler=scheduler)


def _clip_config(tokenizer: Any, width: int, **sizes: Any) -> CLIPTextConfig:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    usual = {"vocab_size": CLIP_VOCABULARY, "hidden_size": width, "intermediate_size": 4 * width}
    return CLIPTextConfig(**usual, **special, **sizes)


def _vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


def _unet_controlnet(unet: Any) -> Any:
    shared = ("cross_attention_dim", "block_out_channels", "layers_per_block", "attention_head_dim", "down_block_types")
    more = ("transformer_layers_per_block", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim")
    names = (*shared, *more, "projection_class_embeddings_input_dim")
    with torch.device("meta"):
        return ControlNetModel(**{name: unet.config[name] for name in names})


def _z_image_controlnet(_: Any) -> Any:
    """As the second version of Z-Image's union ControlNet."""
    with torch.device("meta"):
        return ZImageControlNetModel(
            control_layers_places=list(range(0, 30, 2)),
            control_refiner_layers_places=[0, 1],
            control_in_dim=33,
            add_control_noise_refiner="control_noise_refiner",
        )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "z-image": _z_image,
    "sd15-inpaint": lambda: _sd15(StableDiffusionInpaintPipeline),
    "sdxl-inpaint": lambda: _sdxl(StableDiffusionXLInpaintPipeline),
}
CONTROLNETS: dict[str, Callable[[Any], Any]] = {
    "sd15": _unet_controlnet,
    "sdxl": _unet_controlnet,
    "z-image": _z_image_controlnet,
}
