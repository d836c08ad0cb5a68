"""Qwen-Image's attention over text and image."""

from typing import Any

import torch

from inference.models.attention.flux import projected
from inference.models.attention.heads import attend, rotated


class GroupedQwenAttnProcessor:
    """diffusers' `QwenDoubleStreamAttnProcessor2_0`, with layers of one input run together."""

    def __call__(  # noqa: PLR0917 - diffusers passes all but the first by name
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] = (torch.zeros(0), torch.zeros(0)),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over text and `hidden_states` of the image, [rows, tokens, width] each. Returns image, then text.

        The mask [rows, tokens] is True at the text's own tokens; of the positions, complex numbers [tokens, width / 2],
        the image's come first.
        """
        query, key, value = projected((attn.to_q, attn.to_k, attn.to_v), hidden_states, attn.heads)
        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = projected(of_text, encoder_hidden_states, attn.heads)
        positions = torch.cat(image_rotary_emb[::-1])[None]
        query = rotated(torch.cat((attn.norm_added_q(text_query), attn.norm_q(query)), 1), positions)
        key = rotated(torch.cat((attn.norm_added_k(text_key), attn.norm_k(key)), 1), positions)
        num_text, num_image = encoder_hidden_states.shape[1], hidden_states.shape[1]
        mask = None
        if encoder_hidden_states_mask is not None:
            own = encoder_hidden_states_mask.new_ones(len(hidden_states), num_image)
            mask = torch.cat((encoder_hidden_states_mask, own), 1)[:, None, None]
        attended = attend(query, key, torch.cat((text_value, value), 1), mask).flatten(2)
        text, image = attended.tensor_split((num_text,), 1)
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())
