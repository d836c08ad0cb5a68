"""Checkpoints in one file, as the original training code writes them: the names of diffusers' layers turned back."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
# A pattern of diffusers' names, and what stands in its place.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

UNET_NAMES: tuple[Rule, ...] = (
    (r"(resnets.\d+).norm1", r"\1.in_layers.0"),
    (r"(resnets.\d+).conv1", r"\1.in_layers.2"),
    (r"(resnets.\d+).norm2", r"\1.out_layers.0"),
    (r"(resnets.\d+).conv2", r"\1.out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
    ("^conv_in", "input_blocks.0.0"),
    ("^time_embedding.linear_1", "time_embed.0"),
    ("^time_embedding.linear_2", "time_embed.2"),
    ("^add_embedding.linear_1", "label_emb.0.0"),
    ("^add_embedding.linear_2", "label_emb.0.2"),
    ("^conv_norm_out", "out.0"),
    ("^conv_out", "out.2"),
    ("^mid_block.resnets.0", "middle_block.0"),
    ("^mid_block.attentions.0", "middle_block.1"),
    ("^mid_block.resnets.1", "middle_block.2"),
)
VAE_NAMES: tuple[Rule, ...] = (
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    ("to_out.0", "proj_out"),
    (r"down_blocks.(\d+).resnets", r"down.\1.block"),
    (r"down_blocks.(\d+).downsamplers.0", r"down.\1.downsample"),
)
Z_IMAGE_NAMES: tuple[Rule, ...] = (
    ("^all_final_layer.2-1", "final_layer"),
    ("^all_x_embedder.2-1", "x_embedder"),
    ("attention.to_out.0", "attention.out"),
    ("attention.norm_([qk])", r"attention.\1_norm"),
)
OPEN_CLIP_NAMES: tuple[Rule, ...] = (
    ("^embeddings.position_embedding.weight", "positional_embedding"),
    ("^embeddings.token_embedding", "token_embedding"),
    ("^final_layer_norm", "ln_final"),
    ("^encoder.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
)


def write_single_file(
    path: Path, pipe: Any, *, marks: Sequence[str] = (), metadata: Mapping[str, str] | None = None
) -> Path:
    """Write the pipeline's weights in the layout of its family and return `path`.

    `marks`: names of tensors of one element beside the weights.
    """
    unet = _renamed(pipe.unet.state_dict(), (*UNET_NAMES, *_block_rules(pipe.unet.config)))
    state = _under("model.diffusion_model", unet) | _under("first_stage_model", _vae(pipe.vae))
    if hasattr(pipe, "text_encoder_2"):
        state |= _under("conditioner.embedders.0.transformer.text_model", _text(pipe.text_encoder))
        state |= _under("conditioner.embedders.1.model", _open_clip(pipe.text_encoder_2))
    elif pipe.text_encoder.config.hidden_act == "gelu":
        state |= _under("cond_stage_model.model", _open_clip(pipe.text_encoder))
    else:
        state |= _under("cond_stage_model.transformer.text_model", _text(pipe.text_encoder))
    # What the training code keeps beside the weights.
    state["betas"] = torch.zeros(1000)
    state |= {mark: torch.ones(1) for mark in marks}
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(contiguous, path, None if metadata is None else dict(metadata))
    return path


def write_vae_file(path: Path, vae: Any, *, prefix: str = "") -> Path:
    """Write a VAE alone in the original layout, as it is published, and return `path`."""
    state = {f"{prefix}{name}": tensor.contiguous() for name, tensor in _vae(vae).items()}
    safetensors.torch.save_file(state, path)
    return path


def z_image_tensors(pipe: Any) -> Tensors:
    """Return the weights of a Z-Image as ComfyUI saves a checkpoint."""
    transformer = _renamed(pipe.transformer.state_dict(), Z_IMAGE_NAMES)
    for name in [name for name in transformer if name.endswith("attention.to_q.weight")]:
        parts = [transformer.pop(name.replace("to_q", f"to_{letter}")) for letter in "qkv"]
        transformer[name.replace("to_q", "qkv")] = torch.cat(parts)
    state = _under("model.diffusion_model", transformer) | _under("vae", _vae(pipe.vae))
    state |= _under("text_encoders.qwen3_4b.transformer.model", pipe.text_encoder.state_dict())
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _block_rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """Return the rules for blocks, which are numbered through: each has its layers and one index more."""
    stride = config["layers_per_block"] + 1
    has_attention = ["CrossAttn" in kind for kind in config["up_block_types"]]

    def down(match: re.Match[str]) -> str:
        return f"input_blocks.{1 + int(match[1]) * stride + int(match[3])}.{int(match[2] == 'attentions')}"

    def up(match: re.Match[str]) -> str:
        return f"output_blocks.{int(match[1]) * stride + int(match[3])}.{int(match[2] == 'attentions')}"

    return (
        (r"^down_blocks.(\d+).(resnets|attentions).(\d+)", down),
        (r"^up_blocks.(\d+).(resnets|attentions).(\d+)", up),
        (r"^down_blocks.(\d+).downsamplers.0.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * stride}.0.op"),
        (
            r"^up_blocks.(\d+).upsamplers.0",
            lambda m: f"output_blocks.{(int(m[1]) + 1) * stride - 1}.{1 + has_attention[int(m[1])]}",
        ),
    )


def _vae(vae: Any) -> Tensors:
    last = len(vae.config.up_block_types) - 1
    rules: tuple[Rule, ...] = (
        (r"up_blocks.(\d+).resnets", lambda m: f"up.{last - int(m[1])}.block"),
        (r"up_blocks.(\d+).upsamplers.0", lambda m: f"up.{last - int(m[1])}.upsample"),
        *VAE_NAMES,
    )
    state = _renamed(vae.state_dict(), rules)
    # Attention was written as convolutions of one pixel.
    return {
        name: tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def _text(encoder: Any) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _open_clip(encoder: Any) -> Tensors:
    plain = _text(encoder)
    projection = plain.pop("text_projection.weight", None)
    state = {} if projection is None else {"text_projection": projection.T}
    joined = {name for name in plain if re.search(r"[kv]_proj", name)}
    for name, tensor in plain.items():
        if "q_proj" in name:
            parts = [plain[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif name not in joined:
            state[name] = tensor
    return _renamed(state, OPEN_CLIP_NAMES)


def _renamed(state: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        assert new not in renamed, f"{name} and another are both {new}"
        renamed[new] = tensor
    return renamed


def _under(prefix: str, state: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}
