"""A tiny random checkpoint of Qwen-Image."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.models.tiny_models import HIDDEN, chat_tokenizer

HEAD_DIM, NUM_HEADS = 16, 2


def build_tiny_qwen_image(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen-Image checkpoint of random weights and return `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": HIDDEN,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
                "initializer_range": 0.2,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": HIDDEN,
            },
        )
        pipe = QwenImagePipeline(
            # As in its own scheduler_config.json.
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=_vae(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
    pipe.save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKLQwenImage:
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    with torch.no_grad():
        # As initialised, every image is nearly grey.
        for name, weight in vae.decoder.named_parameters():
            if name.endswith("weight") and "norm" not in name:
                weight.mul_(2)
    return vae


def _transformer() -> QwenImageTransformer2DModel:
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        # As initialised, another prompt gives nearly the same image.
        for name, weight in transformer.named_parameters():
            if name.endswith(("add_v_proj.weight", "txt_in.weight", "to_out.0.weight", "mod.1.weight")):
                weight.mul_(4)
            elif name == "proj_out.weight":
                weight.mul_(2)
    return transformer
