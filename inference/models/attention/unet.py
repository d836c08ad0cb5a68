"""The UNets' attention, without the kernels of diffusers' processor that change nothing in these models."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional

from inference.lora.products.adapted_layers import project
from inference.models.attention.heads import by_heads


class GroupedAttnProcessor:
    """diffusers' `AttnProcessor2_0` for the attention in a `BasicTransformerBlock`, which it is bit-equal to.

    Layers of one input are run together. The output is not divided by a factor of 1, and a mask [rows, 1, tokens] is
    broadcast to the heads instead of copied for each.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `hidden_states` [rows, tokens, width]. diffusers passes arguments by these names."""
        if encoder_hidden_states is None:
            query, key, value = project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        else:
            (query,) = project((attn.to_q,), hidden_states)
            key, value = project((attn.to_k, attn.to_v), encoder_hidden_states)
        query, key, value = (by_heads(one, attn.heads).transpose(1, 2) for one in (query, key, value))
        mask = None if attention_mask is None else attention_mask[:, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: torch.Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return output


def group_projections(net: torch.nn.Module) -> None:
    """Set the processor on every attention of a UNet or its ControlNet that has none of what it leaves out."""
    for module in net.modules():
        if isinstance(module, Attention) and _is_plain(module):
            module.set_processor(GroupedAttnProcessor())


def _is_plain(attn: Any) -> bool:
    left_out = (
        attn.group_norm,
        attn.spatial_norm,
        attn.norm_cross,
        attn.norm_q,
        attn.norm_k,
        attn.added_kv_proj_dim,
        attn.residual_connection,
        attn.fused_projections,
        # Of probability 0 in published models. The engine has them in evaluation anyhow.
        attn.dropout,
    )
    # diffusers sets another processor where attention is scaled otherwise.
    return not any(left_out) and attn.rescale_output_factor == 1.0 and type(attn.processor) is AttnProcessor2_0
