"""Krea 2's attention over text and image, and over the layers of the text encoder that it reads."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_krea2 import Krea2TextFusion

from inference.lora.products.adapted_layers import project
from inference.models.attention.heads import attend, by_heads, rotated


class GroupedKrea2AttnProcessor:
    """diffusers' `Krea2AttnProcessor`, with layers of one input run together, and positions as complex numbers.

    `num_layers`: the tokens that attend to one another, where they are a text encoder's layers; None: those of a row.
    """

    def __init__(self, num_layers: int | None = None) -> None:
        self._num_layers = num_layers

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over `hidden_states` [rows, tokens, width]; diffusers passes arguments by these names."""
        query, key, value = project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        query, key = attn.norm_q(by_heads(query, attn.num_heads)), attn.norm_k(by_heads(key, attn.num_kv_heads))
        value = by_heads(value, attn.num_kv_heads)
        if image_rotary_emb is not None:
            query, key = rotated(query, image_rotary_emb), rotated(key, image_rotary_emb)
        # Of one length: with fewer heads of keys torch takes no kernel that reads a mask.
        num_queries = attn.num_heads // attn.num_kv_heads
        if num_queries > 1:
            key, value = key.repeat_interleave(num_queries, 2), value.repeat_interleave(num_queries, 2)
        if self._num_layers is not None:
            query, key, value = (one.reshape(-1, self._num_layers, *one.shape[2:]) for one in (query, key, value))
        attended = attend(query, key, value, attention_mask).reshape(hidden_states.shape)
        return attn.to_out[0](attended * torch.sigmoid(attn.to_gate(hidden_states)))  # type: ignore[no-any-return]


class RowTextFusion(Krea2TextFusion):  # type: ignore[misc]
    """diffusers' `Krea2TextFusion`, which keeps the layers of a row's tokens in its row: adapters belong to rows.

    A loaded one is given this class.
    """

    def forward(self, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Fuse the states [rows, tokens, layers, width] of a text encoder's layers to [rows, tokens, width]."""
        rows, tokens, layers, width = encoder_hidden_states.shape
        states: torch.Tensor = encoder_hidden_states.reshape(rows, tokens * layers, width)
        for block in self.layerwise_blocks:
            states = block(states)
        states = self.projector(states.view(rows, tokens, layers, width).transpose(2, 3)).squeeze(-1)
        for block in self.refiner_blocks:
            states = block(states, attention_mask=attention_mask)
        return states


def attend_in_rows(transformer: Any) -> None:
    """Give a loaded transformer these processors, and its text fusion the class that keeps rows together."""
    fusion, processor = transformer.text_fusion, GroupedKrea2AttnProcessor()
    fusion.__class__ = RowTextFusion
    of_layers = GroupedKrea2AttnProcessor(transformer.config.num_text_layers)
    for block in (*transformer.transformer_blocks, *fusion.refiner_blocks):
        block.attn.set_processor(processor)
    for block in fusion.layerwise_blocks:
        block.attn.set_processor(of_layers)
