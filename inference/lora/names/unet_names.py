"""Names of a UNet2DConditionModel's layers in adapter files: diffusers' and those of the published code."""

import re

UNET_ROOTS = re.compile(
    "(?:down|up)_blocks_|mid_block_|conv_(?:in|out)|(?:time|add)_embedding_|(?:time|label)_emb|out_2"
    "|(?:input|output)_blocks_|middle_block_"
)
# The underscores of the layers' own names.
UNET_WORDS = re.compile(
    "(?:down|up|input|output|transformer)_blocks|(?:mid|middle)_block|conv_(?:in|out|shortcut)|proj_(?:in|out)"
    "|(?:time|add)_embedding|time_emb_proj|time_embed|label_emb|linear_[12]|to_[qkv]|to_out|(?:in|out|emb)_layers"
    "|skip_connection|(?P<dot>_)"
)
SGM_BLOCK = re.compile(
    r"(?:input_blocks\.(?P<down>[1-9]\d?)|output_blocks\.(?P<up>\d{1,2}))\.(?P<part>[012])\.(?P<rest>.+)"
)
SGM_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
SGM_MIDDLES = ("resnets.0", "attentions.0", "resnets.1")
SGM_OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
SGM_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OLD_ATTENTION = re.compile(r"\.to_(q|k|v|out)(?:_lora)?$")


def unet_layer(layer: str, layers_per_block: int) -> str:
    """Return diffusers' name of a layer in the UNet from its dotted name; unchanged where it is of neither kind."""
    layer = OLD_ATTENTION.sub(lambda found: f".to_{found[1]}" + (".0" if found[1] == "out" else ""), layer)
    if layer in SGM_OUTSIDE_BLOCKS:
        return SGM_OUTSIDE_BLOCKS[layer]
    if (middle := SGM_MIDDLE.fullmatch(layer)) is not None:
        return f"mid_block.{SGM_MIDDLES[int(middle[1])]}.{SGM_RESNET.get(middle[2], middle[2])}"
    if (block := SGM_BLOCK.fullmatch(layer)) is not None:
        return _in_block(block, layers_per_block + 1) or layer
    return layer


def _in_block(found: re.Match[str], layers: int) -> str:
    """Return diffusers' name of a layer in an SGM block; empty where there is none.

    SGM numbers the layers of all blocks in one row, `layers` a block. A downsampler is a layer of its own, an upsampler
    the last part of one.
    """
    is_down, part, rest = found["down"] is not None, int(found["part"]), found["rest"]
    number, index = divmod(int(found["down"]) - 1 if is_down else int(found["up"]), layers)
    block = f"{'down' if is_down else 'up'}_blocks.{number}"
    if rest == ("op" if is_down else "conv"):
        return f"{block}.{'downsamplers' if is_down else 'upsamplers'}.0.conv"
    if part == 0:
        return f"{block}.resnets.{index}.{SGM_RESNET.get(rest, rest)}"
    return f"{block}.attentions.{index}.{rest}" if part == 1 else ""
