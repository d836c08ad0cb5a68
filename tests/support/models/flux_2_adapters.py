"""FLUX.2's layers by the names of the code that it was published with, for `tests.support.models.flux_adapters`."""

from typing import Any

# By the published name of a layer, those of diffusers that it is, top to bottom.
DOUBLE_BLOCK = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE_BLOCK = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# By diffusers' names. A double block has a list of that name, and in it the layer.
SINGLE_OUT = tuple(f"single_transformer_blocks.{number}.attn.to_out" for number in range(2))
FLUX_2_EVERY_LAYER = (
    *(part for table in (DOUBLE_BLOCK, OUTSIDE) for parts in table.values() for part in parts),
    "attn.to_qkv_mlp_proj",
    *SINGLE_OUT,
)


def published_layers(transformer: Any) -> dict[str, tuple[str, ...]]:
    """Map the published name of every layer to diffusers' names of what it is."""
    tables = {
        "double_blocks": (DOUBLE_BLOCK, "transformer_blocks"),
        "single_blocks": (SINGLE_BLOCK, "single_transformer_blocks"),
    }
    found = {
        f"{blocks}.{number}.{name}": tuple(f"{kind}.{number}.{part}" for part in parts)
        for blocks, (table, kind) in tables.items()
        for number in range(len(getattr(transformer, kind)))
        for name, parts in table.items()
    }
    return found | OUTSIDE
