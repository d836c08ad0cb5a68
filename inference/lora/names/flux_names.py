"""Names of a FluxTransformer2DModel's layers in adapter files: diffusers', those of the published code, and X-Labs'."""

import re

FLUX_ROOTS = re.compile(
    "(?:double|single|transformer|single_transformer)_blocks_|(?:img|txt)_in|(?:time|vector|guidance)_in_|final_layer_"
    "|(?:x|context)_embedder|time_text_embed_|norm_out_|proj_out"
)
# The underscores of the layers' own names.
FLUX_WORDS = re.compile(
    "(?:double|single|transformer|single_transformer)_blocks|(?:img|txt)_(?:attn|mlp|mod|in)|(?:time|vector|guidance)_in"
    "|(?:in|out|final)_layer|adaLN_modulation|(?:ff|norm1)_context|to_[qkv]|to_out|to_add_out|add_[qkv]_proj"
    "|proj_(?:mlp|out)|(?:x|context|text|guidance|timestep)_embedder|time_text_embed|linear_[12]|norm_out|(?P<dot>_)"
)
BLOCK = re.compile(r"(?P<kind>double|single)_blocks\.(?P<number>\d+)\.(?P<layer>.+)")
# Of the published code, of OneTrainer, which numbers the parts of fused layers, and of X-Labs.
BLOCK_LAYERS = {
    "double": {
        "img_attn.qkv": "attn.to_qkv",
        "img_attn.qkv.0": "attn.to_q",
        "img_attn.qkv.1": "attn.to_k",
        "img_attn.qkv.2": "attn.to_v",
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.qkv": "attn.to_added_qkv",
        "txt_attn.qkv.0": "attn.add_q_proj",
        "txt_attn.qkv.1": "attn.add_k_proj",
        "txt_attn.qkv.2": "attn.add_v_proj",
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
        "qkv_lora1": "attn.to_qkv",
        "qkv_lora2": "attn.to_added_qkv",
        "proj_lora1": "attn.to_out.0",
        "proj_lora2": "attn.to_add_out",
    },
    "single": {
        "linear1.0": "attn.to_q",
        "linear1.1": "attn.to_k",
        "linear1.2": "attn.to_v",
        "linear1.3": "proj_mlp",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
        "qkv_lora": "attn.to_qkv",
        "proj_lora": "proj_out",
    },
}
BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
OUTSIDE_BLOCKS = {
    "img_in": "x_embedder",
    "img_in.proj": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.shift_scale",
}
# The MLP of a single block is four times as wide as the block.
FLUX_FUSED = {
    ".attn.to_qkv": {".attn.to_q": 1, ".attn.to_k": 1, ".attn.to_v": 1},
    ".attn.to_added_qkv": {".attn.add_q_proj": 1, ".attn.add_k_proj": 1, ".attn.add_v_proj": 1},
    ".linear1": {".attn.to_q": 1, ".attn.to_k": 1, ".attn.to_v": 1, ".proj_mlp": 4},
    ".norm_out.shift_scale": {".norm_out.linear": 1},
}
# The published code has the shift first, diffusers the scale.
FLUX_SWAPPED = (".norm_out.shift_scale",)


# Chroma's own, which takes the place of the layers of time and guidance.
CHROMA_ROOTS = re.compile(f"{FLUX_ROOTS.pattern}|distilled_guidance_layer_")
CHROMA_WORDS = re.compile(f"distilled_guidance_layer|in_proj|out_proj|{FLUX_WORDS.pattern}")
DISTILLED = re.compile(r"(?P<layer>distilled_guidance_layer\.layers\.\d+)\.(?P<side>in|out)_layer")


def chroma_layer(layer: str) -> str:
    """Return diffusers' name of a layer of Chroma's transformer."""
    if (found := DISTILLED.fullmatch(layer)) is not None:
        return f"{found['layer']}.linear_{1 if found['side'] == 'in' else 2}"
    return flux_layer(layer)


def flux_layer(layer: str) -> str:
    """Return diffusers' name of a transformer's layer. A fused one keeps one that `FLUX_FUSED` splits."""
    if (found := BLOCK.fullmatch(layer)) is None:
        return OUTSIDE_BLOCKS.get(layer, layer)
    own = BLOCK_LAYERS[found["kind"]].get(found["layer"], found["layer"])
    return f"{BLOCKS[found['kind']]}.{found['number']}.{own}"
