"""Tiny random checkpoints of FLUX.1 dev and schnell, native 64x64 px."""

import string
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from tests.support.models.tiny_models import HIDDEN, byte_tokenizer, clip_config, flow_vae

HEAD_DIM, NUM_HEADS = 16, 4


def build_tiny_flux(folder: Path, *, seed: int = 0, is_schnell: bool = False) -> Path:
    """Write a FLUX.1 checkpoint of random weights and return `folder`; schnell reads no guidance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = byte_tokenizer()
        tokenizer_2 = letter_tokenizer()
        pipe = FluxPipeline(
            # As in their own scheduler_config.json.
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000,
                shift=1.0 if is_schnell else 3.0,
                use_dynamic_shifting=not is_schnell,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=flow_vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizer, num_hidden_layers=2)),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(tiny_t5(tokenizer_2)),
            tokenizer_2=tokenizer_2,
            transformer=_transformer(has_guidance=not is_schnell),
        )
    pipe.save_pretrained(folder)
    return folder


def _transformer(*, has_guidance: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        guidance_embeds=has_guidance,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        # As initialised, another prompt or guidance gives nearly the same picture.
        for name, weight in transformer.named_parameters():
            if name.endswith(("add_v_proj.weight", "context_embedder.weight")):
                weight.mul_(4)
            elif name.startswith("time_text_embed") and name.endswith("weight"):
                weight.mul_(2)
    return transformer


def tiny_t5(tokenizer: T5Tokenizer) -> T5Config:
    """Return the configuration of a tiny T5 with that tokenizer."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=HIDDEN,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def letter_tokenizer() -> T5Tokenizer:
    """Build T5's tokenizer with a token a letter."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = [(word, 0.0) for word in special] + [(letter, -2.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
