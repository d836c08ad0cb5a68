"""Tiny random checkpoints of every family, native 64x64 px, made in seconds by the real libraries."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from tests.support.models.tiny_adapters import (
    ATTENTION,
    EVERY_LAYER,
    TEXT_LAYERS,
    Z_IMAGE_BLOCKS,
    Z_IMAGE_EVERY_LAYER,
    Layout,
    write_adapter,
)

__all__ = [
    "ATTENTION",
    "EVERY_LAYER",
    "HIDDEN",
    "MAX_TOKENS",
    "PIXELS",
    "TEXT_LAYERS",
    "Z_IMAGE_BLOCKS",
    "Z_IMAGE_EVERY_LAYER",
    "Layout",
    "build_tiny_sd",
    "build_tiny_sd2",
    "build_tiny_sd_inpaint",
    "build_tiny_sdxl",
    "build_tiny_sdxl_inpaint",
    "build_tiny_z_image",
    "byte_tokenizer",
    "clip_config",
    "flow_vae",
    "load_pipe",
    "write_adapter",
]

PIXELS = 64
HIDDEN = 32
MAX_TOKENS = 77

# Of the second text encoder of SDXL: another width than the first, and another again for what it pools.
HIDDEN_2 = 48
POOLED = 40

# The betas of every Stable Diffusion.
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# As in SDXL's own scheduler_config.json: with settings of other schedulers, which they are to find in it.
SDXL_SCHEDULER = BETAS | {
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}

# What Qwen3's own template makes of one message of a user's.
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""


def build_tiny_sd(folder: Path, *, seed: int = 0) -> Path:
    """Write a Stable Diffusion 1.x checkpoint of random weights and return `folder`."""
    # As in Stable Diffusion 1.5's own scheduler_config.json.
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return _build_sd(folder, scheduler, seed=seed)


def build_tiny_sd2(folder: Path, *, seed: int = 0) -> Path:
    """Write a Stable Diffusion 2.x checkpoint that predicts v, as its 768 px checkpoints do."""
    # As in Stable Diffusion 2.1's own scheduler_config.json.
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    return _build_sd(folder, scheduler, seed=seed, hidden_act="gelu", use_linear_projection=True)


def build_tiny_sd_inpaint(folder: Path, *, seed: int = 0) -> Path:
    """Write a Stable Diffusion 1.x checkpoint for inpainting, whose UNet reads a mask and the masked image."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return _build_sd(folder, scheduler, seed=seed, pipeline=StableDiffusionInpaintPipeline)


def _build_sd(
    folder: Path,
    scheduler: Any,
    *,
    seed: int,
    pipeline: Any = StableDiffusionPipeline,
    hidden_act: str = "quick_gelu",
    use_linear_projection: bool = False,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        pipe = pipeline(
            unet=UNet2DConditionModel(
                sample_size=PIXELS // 8,
                in_channels=_in_channels(pipeline),
                block_out_channels=(HIDDEN, 64, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=HIDDEN,
                attention_head_dim=2,
                norm_num_groups=8,
                use_linear_projection=use_linear_projection,
            ),
            text_encoder=CLIPTextModel(clip_config(tokenizer, num_hidden_layers=2, hidden_act=hidden_act)),
            tokenizer=tokenizer,
            vae=_vae(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        _heed_prompts(pipe.unet)
    pipe.save_pretrained(folder)
    return folder


def build_tiny_sdxl_inpaint(folder: Path, *, seed: int = 0) -> Path:
    """Write an SDXL checkpoint for inpainting, whose UNet reads a mask and the masked image."""
    return build_tiny_sdxl(folder, seed=seed, pipeline=StableDiffusionXLInpaintPipeline)


def _in_channels(pipeline: Any) -> int:
    return 9 if "Inpaint" in pipeline.__name__ else 4


def build_tiny_sdxl(
    folder: Path, *, seed: int = 0, force_zeros: bool = True, pipeline: Any = StableDiffusionXLPipeline
) -> Path:
    """Write an SDXL checkpoint of random weights, its blocks in SDXL's own order, and return `folder`.

    `force_zeros`: whether no negative prompt means zeros, as in the base checkpoint, or the encoding of "".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = byte_tokenizer(), byte_tokenizer(pad_token="!")
        pipe = pipeline(
            unet=_sdxl_unet(_in_channels(pipeline)),
            text_encoder=CLIPTextModel(clip_config(tokenizer, num_hidden_layers=3)),
            text_encoder_2=CLIPTextModelWithProjection(
                clip_config(
                    tokenizer_2,
                    num_hidden_layers=4,
                    hidden_size=HIDDEN_2,
                    num_attention_heads=3,
                    projection_dim=POOLED,
                    hidden_act="gelu",
                )
            ),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            vae=_vae(scaling_factor=0.13025),
            scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
        _heed_prompts(pipe.unet)
    pipe.save_pretrained(folder)
    return folder


def _sdxl_unet(in_channels: int) -> UNet2DConditionModel:
    size_dim = 8
    return UNet2DConditionModel(
        sample_size=PIXELS // 8,
        in_channels=in_channels,
        block_out_channels=(HIDDEN, 48, 64),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN + HIDDEN_2,
        # The number of heads, as diffusers reads it.
        attention_head_dim=(2, 3, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_dim,
        # Six numbers tell the original size, the crop and the target size.
        projection_class_embeddings_input_dim=6 * size_dim + POOLED,
    )


def _heed_prompts(unet: UNet2DConditionModel) -> None:
    """Let another prompt, or another mask, give another picture: as initialised, tests could not see the difference."""
    with torch.no_grad():
        unet.conv_in.weight[:, unet.config.out_channels :].mul_(4)
        for name, weight in unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                weight.mul_(8)
            elif name.startswith("add_embedding") and name.endswith("weight"):
                weight.mul_(4)


def clip_config(tokenizer: CLIPTokenizer, **sizes: Any) -> CLIPTextConfig:
    """Describe a small CLIP for the tokenizer, with these sizes of its own."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    usual = {"hidden_size": HIDDEN, "num_attention_heads": 2, "max_position_embeddings": MAX_TOKENS}
    return CLIPTextConfig(**usual | special | {"vocab_size": len(tokenizer), "intermediate_size": 64} | sizes)


def byte_tokenizer(**special: str) -> CLIPTokenizer:
    """Build CLIP's byte-level tokenizer without any merges but one: a token a byte."""
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*characters, *(f"{character}</w>" for character in characters), "th", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("t", "h")], model_max_length=MAX_TOKENS, **special)


def build_tiny_z_image(folder: Path, *, seed: int = 0, shift: float = 3.0, dynamic: bool = False) -> Path:
    """Write a Z-Image checkpoint of random weights and return `folder`.

    Its schedule is shifted by `shift`, as Turbo's, or where `dynamic` by the number of the picture's tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        pipe = ZImagePipeline(
            transformer=_z_image_transformer(),
            text_encoder=Qwen3Model(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=HIDDEN,
                    intermediate_size=64,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=16,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    # At the usual 0.02 so small a model would hardly mix its tokens.
                    initializer_range=0.2,
                )
            ),
            tokenizer=tokenizer,
            vae=flow_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000, shift=shift, use_dynamic_shifting=dynamic
            ),
        )
    pipe.save_pretrained(folder)
    return folder


def _z_image_transformer() -> ZImageTransformer2DModel:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=HIDDEN,
        axes_dims=[8, 12, 12],
        # A caption of 512 tokens and the picture behind it; 2048 pixels on a side.
        axes_lens=[1024, 128, 128],
    )
    with torch.no_grad():
        # Zeros, as the class makes them, would hide where padding is forgotten or mixed up.
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    return transformer


def chat_tokenizer() -> Qwen2Tokenizer:
    """Build Qwen's byte-level tokenizer without any merges, and its chat template: a token a byte, one a special
    token.
    """
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(characters)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=131072,
    )


def flow_vae() -> AutoencoderKL:
    """Build a VAE like FLUX.1's, which Z-Image took over."""
    return _vae(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=PIXELS,
        **settings,
    )
    with torch.no_grad():
        # As initialised, it makes nearly the same latents of every picture.
        vae.encoder.conv_out.weight.mul_(16)
    return vae


def load_pipe(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load the checkpoint with plain diffusers: on the CPU, without a progress bar."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
