"""FLUX.1's attention over text and image, and its rotary positions, which all lanes of one size share."""

from functools import lru_cache
from typing import Any

import torch

from inference.device.uploads import upload
from inference.lora.products.adapted_layers import project
from inference.models.attention.heads import attend, by_heads, rotated

MAX_SIZES = 32


class GroupedFluxAttnProcessor:
    """diffusers' `FluxAttnProcessor`, with layers of one input run together, and positions as complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> Any:
        """Attend over `hidden_states` [rows, tokens, width], in a double block behind those of the text.

        diffusers passes arguments by these names, the mask for Chroma alone. Returns one output for each input.
        """
        query, key, value = projected((attn.to_q, attn.to_k, attn.to_v), hidden_states, attn.heads)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = projected(of_text, encoder_hidden_states, attn.heads)
            query = torch.cat((attn.norm_added_q(text_query), query), 1)
            key = torch.cat((attn.norm_added_k(text_key), key), 1)
            value = torch.cat((text_value, value), 1)
        if image_rotary_emb is not None:
            query, key = rotated(query, image_rotary_emb), rotated(key, image_rotary_emb)
        attended = attend(query, key, value, attention_mask).flatten(2)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.tensor_split((encoder_hidden_states.shape[1],), 1)
        return attn.to_out[0](image.contiguous()), attn.to_add_out(text.contiguous())


def projected(layers: Any, x: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    """Return the output of each layer for their one input, split into heads."""
    return [by_heads(one, num_heads) for one in project(layers, x)]


class RotaryPositions(torch.nn.Module):
    """The transformer's `pos_embed`: a table [1, tokens, width / 2] of complex numbers, computed once for each size.

    Owner of the size of the running forward. `set` and the forward are the engine's thread's.
    """

    def __init__(self, plain: Any, device: torch.device) -> None:
        """Compute tables by `plain`, diffusers' own module, on `device`."""
        super().__init__()
        self._plain = plain
        self._device = device
        self._table_of = lru_cache(MAX_SIZES)(self._compute)
        self._size = (0, 0, 0)

    def set(self, *, num_text: int, height: int, width: int) -> None:
        """Set the tokens of the next forward: of the text, and of the image's height and width."""
        self._size = num_text, height, width

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the table of the size that was set; `ids`, in which diffusers passes positions, are not read."""
        return self._table_of(*self._size)

    def _compute(self, num_text: int, height: int, width: int) -> torch.Tensor:
        places = torch.zeros(num_text + height * width, 3)
        # Text has no place. Of the three coordinates FLUX.1 leaves the first unused.
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places[num_text:, 1], places[num_text:, 2] = rows.flatten(), columns.flatten()
        # On the host, for the widest type that diffusers computes them in.
        cosine, sine = self._plain(places)
        return upload(torch.complex(cosine[:, ::2].contiguous(), sine[:, ::2].contiguous())[None], self._device)
