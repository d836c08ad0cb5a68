"""Names of a Krea2Transformer2DModel's layers in adapter files: diffusers' and those of the published code."""

import re

KREA2_ROOTS = re.compile(
    "(?:transformer_)?blocks_|txtfusion_|text_fusion_|txtmlp_|txt_in_|tmlp_|tproj_|time_embed_|time_mod_proj|first|img_in"
    "|last_|final_layer_"
)
# The underscores of the layers' own names.
KREA2_WORDS = re.compile(
    "(?:transformer|layerwise|refiner)_blocks|text_fusion|txt_in|img_in|time_embed|time_mod_proj|final_layer"
    "|linear_[12]|to_[qkv]|to_gate|to_out|(?P<dot>_)"
)
BLOCK = re.compile(
    r"(?:blocks|(?:txtfusion|text_fusion)\.(?P<kind>layerwise_blocks|refiner_blocks))\.(?P<number>\d+)\.(?P<layer>.+)"
)
BLOCK_LAYERS = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
OUTSIDE_BLOCKS = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}


def krea2_layer(layer: str) -> str:
    """Return diffusers' name of a transformer's layer."""
    if (found := BLOCK.fullmatch(layer)) is None:
        return OUTSIDE_BLOCKS.get(layer, layer)
    blocks = f"text_fusion.{found['kind']}" if found["kind"] else "transformer_blocks"
    return f"{blocks}.{found['number']}.{BLOCK_LAYERS.get(found['layer'], found['layer'])}"
