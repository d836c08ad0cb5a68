"""A tiny random checkpoint of Chroma, native 64x64 px."""

from pathlib import Path

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5EncoderModel

from tests.support.models.tiny_flux import HEAD_DIM, NUM_HEADS, letter_tokenizer, tiny_t5
from tests.support.models.tiny_models import HIDDEN, flow_vae


def build_tiny_chroma(folder: Path, *, seed: int = 0) -> Path:
    """Write a Chroma checkpoint of random weights and return `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = letter_tokenizer()
        pipe = ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=flow_vae(),
            text_encoder=T5EncoderModel(tiny_t5(tokenizer)),
            tokenizer=tokenizer,
            transformer=_transformer(),
        )
    pipe.save_pretrained(folder)
    return folder


def _transformer() -> ChromaTransformer2DModel:
    transformer = ChromaTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    with torch.no_grad():
        # As initialised, another prompt gives nearly the same image.
        for name, weight in transformer.named_parameters():
            if name.endswith(("add_v_proj.weight", "context_embedder.weight")):
                weight.mul_(4)
            elif name.startswith("distilled_guidance_layer.out_proj") or name == "proj_out.weight":
                weight.mul_(3)
    return transformer
