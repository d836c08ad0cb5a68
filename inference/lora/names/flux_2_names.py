"""Names of a Flux2Transformer2DModel's layers in adapter files: diffusers' and those of the published code."""

import re

FLUX_2_ROOTS = re.compile(
    "(?:double|single|transformer|single_transformer)_blocks_|(?:img|txt)_in|(?:time|guidance)_in_|final_layer_"
    "|(?:x|context)_embedder|time_guidance_embed_|norm_out_|proj_out|(?:double|single)_stream_modulation"
)
# The underscores of the layers' own names.
FLUX_2_WORDS = re.compile(
    "(?:double|single|transformer|single_transformer)_blocks|(?:img|txt)_(?:attn|mlp|in)|(?:time|guidance)_in"
    "|(?:in|out|final)_layer|adaLN_modulation|ff_context|to_qkv_mlp_proj|to_[qkv]|to_out|to_add_out|add_[qkv]_proj"
    "|proj_out|(?:x|context|guidance|timestep)_embedder|time_guidance_embed|linear_(?:[12]|in|out)|norm_out"
    "|double_stream_modulation_(?:img|txt)|single_stream_modulation|(?P<dot>_)"
)
BLOCK = re.compile(r"(?P<kind>double_|single_|sformer_)blocks\.(?P<number>\d+)\.(?P<layer>.+)")
# Of the published code.
BLOCK_LAYERS = {
    "double_": {
        "img_attn.qkv": "attn.to_qkv",
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_attn.qkv": "attn.to_added_qkv",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    },
    "single_": {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    # diffusers' names, whose first letters some writer cuts off.
    "sformer_": {},
}
BLOCKS = {"double_": "transformer_blocks", "single_": "single_transformer_blocks", "sformer_": "transformer_blocks"}
OUTSIDE_BLOCKS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.shift_scale",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}
FLUX_2_FUSED = {
    ".attn.to_qkv": {".attn.to_q": 1, ".attn.to_k": 1, ".attn.to_v": 1},
    ".attn.to_added_qkv": {".attn.add_q_proj": 1, ".attn.add_k_proj": 1, ".attn.add_v_proj": 1},
    ".norm_out.shift_scale": {".norm_out.linear": 1},
}
# The published code has the shift first, diffusers the scale.
FLUX_2_SWAPPED = (".norm_out.shift_scale",)


def flux_2_layer(layer: str) -> str:
    """Return diffusers' name of a transformer's layer. A fused one keeps one that `FLUX_2_FUSED` splits."""
    if (found := BLOCK.fullmatch(layer)) is None:
        return OUTSIDE_BLOCKS.get(layer, layer)
    own = BLOCK_LAYERS[found["kind"]].get(found["layer"], found["layer"])
    return f"{BLOCKS[found['kind']]}.{found['number']}.{own}"
