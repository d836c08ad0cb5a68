"""FLUX.2's attention over text, image and references, and its rotary positions, which all lanes of one shape share."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from inference.device.uploads import upload
from inference.models.attention.flux import GroupedFluxAttnProcessor
from inference.models.attention.heads import attend, by_heads, rotated

MAX_LAYOUTS = 32
# The first coordinate of a reference, as of one beside the image: so far behind the one before it.
REFERENCE_DISTANCE = 10
# What diffusers is given for positions: those of the image are found for all, text's included.
IMAGE_IDS, TEXT_IDS = torch.zeros(1, 4), torch.zeros(0, 4)

Tables = tuple[torch.Tensor, torch.Tensor]


class Layout(NamedTuple):
    """The tokens of a row: of the text, and of height and width of the image and of each reference."""

    num_text: int
    grids: Sequence[tuple[int, int]]


class GroupedFlux2AttnProcessor:
    """diffusers' `Flux2AttnProcessor`, of the double blocks: FLUX.1's, by the positions in the first of two tables."""

    _attend = GroupedFluxAttnProcessor()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Any:
        """Attend over `hidden_states` [rows, tokens, width], behind those of the text."""
        places = None if image_rotary_emb is None else image_rotary_emb[0][None]
        return self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, places)


class Flux2SingleAttnProcessor:
    """diffusers' `Flux2ParallelSelfAttnProcessor`, with positions as complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> torch.Tensor:
        """Attend over `hidden_states` [rows, tokens, width], beside the feed-forward, which has layers in common."""
        width = attn.inner_dim
        projected = attn.to_qkv_mlp_proj(hidden_states)
        query, key, value, gated = projected.split((width, width, width, projected.shape[-1] - 3 * width), -1)
        query, key, value = (by_heads(one, attn.heads) for one in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            places = image_rotary_emb[0][None]
            query, key = rotated(query, places), rotated(key, places)
        attended = attend(query, key, value).flatten(2)
        joined: torch.Tensor = attn.to_out(torch.cat((attended, attn.mlp_act_fn(gated)), -1))
        return joined


class Flux2Positions(torch.nn.Module):
    """The transformer's `pos_embed`: a table [tokens, width / 2] of complex numbers, computed once for each layout.

    Owner of the layout of the running forward. `set` and the forward are the engine's thread's.
    """

    def __init__(self, plain: Any, device: torch.device) -> None:
        """Compute tables by `plain`, diffusers' own module, on `device`."""
        super().__init__()
        self._plain = plain
        self._device = device
        self._table_of = lru_cache(MAX_LAYOUTS)(self._compute)
        self._layout = Layout(0, ())

    def set(self, layout: Layout) -> None:
        """Set the layout of the next forward."""
        self._layout = layout

    def forward(self, ids: torch.Tensor) -> Tables:
        """Return the table of the layout for `IMAGE_IDS`, and an empty one for `TEXT_IDS`: diffusers joins the two.

        It joins cosines and sines apart; the second of each is empty.
        """
        table = self._table_of(self._layout)
        return (table if len(ids) else table[:0]), table[:0]

    def _compute(self, layout: Layout) -> torch.Tensor:
        text = torch.zeros(layout.num_text, 4)
        text[:, 3] = torch.arange(layout.num_text)
        images = [
            torch.cartesian_prod(
                torch.tensor([REFERENCE_DISTANCE * number]), torch.arange(height), torch.arange(width), torch.arange(1)
            )
            for number, (height, width) in enumerate(layout.grids)
        ]
        # On the host, for the widest type that diffusers computes them in.
        cosine, sine = self._plain(torch.cat((text, *images)))
        return upload(torch.complex(cosine[:, ::2].contiguous(), sine[:, ::2].contiguous()), self._device)
