"""Tiny random checkpoints of FLUX.2 klein, base and distilled, native 64x64 px."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.support.models.tiny_models import HIDDEN, PIXELS, chat_tokenizer

# The states of the 27th layer are the last that are read.
NUM_ENCODER_LAYERS = 30
LATENT_CHANNELS = 4
HEAD_DIM, NUM_HEADS = 16, 4


def build_tiny_flux_2(folder: Path, *, seed: int = 0, is_distilled: bool = False) -> Path:
    """Write a FLUX.2 klein checkpoint of random weights and return `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        pipe = Flux2KleinPipeline(
            # As in their own scheduler_config.json.
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000,
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=_vae(),
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=HIDDEN,
                    intermediate_size=64,
                    num_hidden_layers=NUM_ENCODER_LAYERS,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=16,
                    tie_word_embeddings=True,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    # At the usual 0.02 so small a model would hardly mix its tokens.
                    initializer_range=0.2,
                )
            ),
            tokenizer=tokenizer,
            transformer=_transformer(),
            is_distilled=is_distilled,
        )
    pipe.save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        sample_size=PIXELS,
    )
    with torch.no_grad():
        # As initialised, it makes nearly the same latents of every picture, and its statistics do nothing.
        vae.encoder.conv_out.weight.mul_(16)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 4.0)
    return vae


def _transformer() -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=3 * HIDDEN,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    with torch.no_grad():
        # As initialised, another prompt or reference gives nearly the same picture.
        for name, weight in transformer.named_parameters():
            if name.endswith(("to_v.weight", "add_v_proj.weight", "_embedder.weight")):
                weight.mul_(4)
            elif "modulation" in name or "time_guidance" in name or "norm_k" in name:
                weight.mul_(2)
            elif "norm_q" in name:
                # Among 512 tokens of text, those of a reference would hardly be seen.
                weight.mul_(4)
    return transformer
