"""A tiny random checkpoint of Krea 2, native 64x64 px."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

from tests.support.models.tiny_models import HIDDEN, PIXELS, chat_tokenizer

# Of the text encoder's states, 0 those of its embedding.
LAYERS = (1, 2, 4)
HEAD_DIM, NUM_HEADS = 16, 4


def build_tiny_krea2(folder: Path, *, seed: int = 0, is_turbo: bool = False) -> Path:
    """Write a Krea 2 checkpoint of random weights and return `folder`: Raw, or with `is_turbo` Turbo."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        pipe = Krea2Pipeline(
            # As its own scheduler_config.json.
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=6400,
            ),
            vae=_vae(),
            text_encoder=Qwen3VLModel(_text_encoder_config(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(),
            text_encoder_select_layers=LAYERS,
            is_distilled=is_turbo,
        )
    pipe.save_pretrained(folder)
    return folder


def _text_encoder_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            # At the usual 0.02 so small a model would hardly mix its tokens.
            "initializer_range": 0.2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )


def _transformer() -> Krea2Transformer2DModel:
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        intermediate_size=96,
        timestep_embed_dim=32,
        text_hidden_dim=HIDDEN,
        num_text_layers=len(LAYERS),
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=48,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        # As initialised, it is nearly the same velocity for every prompt, and zeros leave out the modulations.
        for name, weight in transformer.named_parameters():
            if name.endswith(("scale_shift_table", "norm.weight", "norm1.weight", "norm2.weight")):
                weight.normal_(std=0.2)
            elif name.endswith(
                ("to_v.weight", "to_out.0.weight", "txt_in.linear_2.weight", "final_layer.linear.weight")
            ):
                weight.mul_(3)
    return transformer


def _vae() -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    # Its class has no entry for it.
    vae.register_to_config(sample_size=PIXELS)
    with torch.no_grad():
        # As initialised, its images are nearly grey, and its latents nearly the same of every image.
        vae.decoder.conv_out.weight.mul_(4)
        vae.encoder.conv_out.weight.mul_(16)
    return vae
