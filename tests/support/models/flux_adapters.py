"""Random adapters of FLUX.1 by the names of the code that it was published with, and the same by diffusers' names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]

# By the published name of a layer, those of diffusers that it is, top to bottom.
DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE_BLOCK = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# Of X-Labs' processors: the attention of a double block, and of a single block what its processor replaces.
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "double_blocks.{}.processor.proj_lora1": ("attn.to_out.0",),
    "double_blocks.{}.processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "double_blocks.{}.processor.proj_lora2": ("attn.to_add_out",),
    "single_blocks.{}.processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "single_blocks.{}.processor.proj_lora": ("proj_out",),
}
# The layers of a block and around them that adapters are trained on, by diffusers' names.
FLUX_EVERY_LAYER = tuple(
    sorted({part for table in (DOUBLE_BLOCK, SINGLE_BLOCK, OUTSIDE) for parts in table.values() for part in parts})
)


def published_layers(transformer: Any) -> dict[str, tuple[str, ...]]:
    """Map the published name of every layer to diffusers' names of what it is."""
    return {
        **_in_blocks("double_blocks.{}.", DOUBLE_BLOCK, "transformer_blocks", len(transformer.transformer_blocks)),
        **_in_blocks(
            "single_blocks.{}.", SINGLE_BLOCK, "single_transformer_blocks", len(transformer.single_transformer_blocks)
        ),
        **OUTSIDE,
    }


def xlabs_layers(transformer: Any) -> dict[str, tuple[str, ...]]:
    """Map X-Labs' names of the layers that its adapters have to diffusers'."""
    found: dict[str, tuple[str, ...]] = {}
    for name, parts in XLABS.items():
        kind = "transformer_blocks" if name.startswith("double") else "single_transformer_blocks"
        found |= _in_blocks("", {name: parts}, kind, len(getattr(transformer, kind)))
    return found


def _in_blocks(
    prefix: str, table: Mapping[str, tuple[str, ...]], kind: str, num_blocks: int
) -> dict[str, tuple[str, ...]]:
    return {
        (prefix + name).format(number): tuple(f"{kind}.{number}.{part}" for part in parts)
        for number in range(num_blocks)
        for name, parts in table.items()
    }


def random_pairs(
    transformer: Any, layers: Mapping[str, tuple[str, ...]], *, rank: int, seed: int, strength: float = 1.0
) -> Pairs:
    """Make random A and B for the layers, by their names; of fused ones B has the rows of all parts."""
    generator = torch.Generator().manual_seed(seed)
    pairs: Pairs = {}
    for name, parts in layers.items():
        modules = [transformer.get_submodule(part) for part in parts]
        fan_in, fan_out = modules[0].in_features, sum(module.out_features for module in modules)
        a = torch.randn(rank, fan_in, generator=generator) / fan_in**0.5
        pairs[name] = a, strength * torch.randn(fan_out, rank, generator=generator) / (rank * fan_out) ** 0.5
    return pairs


def by_diffusers_names(
    transformer: Any, layers: Mapping[str, tuple[str, ...]], pairs: Pairs, *, scale: float = 1.0
) -> Pairs:
    """Split the fused layers, and put the scale before the shift as diffusers has them."""
    split: Pairs = {}
    for name, (a, b) in pairs.items():
        rows = [transformer.get_submodule(part).out_features for part in layers[name]]
        if name == "final_layer.adaLN_modulation.1":
            b = torch.cat(b.chunk(2)[::-1])  # noqa: PLW2901
        split |= {part: (a, scale * own) for part, own in zip(layers[name], b.split(rows), strict=True)}
    return split


def write_pairs(
    path: Path, pairs: Pairs, stem: Callable[[str], str], halves: tuple[str, str], alpha: float | None = None
) -> Path:
    """Write them with these names of stems and halves, each with the alpha, and return `path`."""
    tensors: Tensors = {}
    for name, weights in pairs.items():
        tensors |= {f"{stem(name)}.{half}.weight": one.clone() for half, one in zip(halves, weights, strict=True)}
        if alpha is not None:
            tensors[f"{stem(name)}.alpha"] = torch.tensor(alpha)
    safetensors.torch.save_file(tensors, path)
    return path
