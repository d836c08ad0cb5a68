"""Z-Image's attention, computed row by row over each row's own tokens.

Rows of a batch differ in length by their captions and image sizes, and diffusers masks the padding of the shorter ones,
which excludes torch's fastest kernels. The lengths of the rows are known on the host.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch.nn import functional


class RowTokens(NamedTuple):
    """Number of tokens of a row's image and caption, with diffusers' padding to a multiple."""

    image: int
    caption: int


class Stream(Enum):
    """The tokens of a row that a block reads."""

    IMAGE = "image"
    CAPTION = "caption"
    BOTH = "both"


class RowLengths:
    """Owner of the rows' lengths in the running forward; none between forwards. Used by the engine's thread."""

    def __init__(self) -> None:
        self._lengths: dict[Stream, list[int]] = {}

    def set(self, rows: Sequence[RowTokens]) -> None:
        """Set the rows of the next forward, in order."""
        self._lengths = {
            Stream.IMAGE: [row.image for row in rows],
            Stream.CAPTION: [row.caption for row in rows],
            Stream.BOTH: [row.image + row.caption for row in rows],
        }

    @contextmanager
    def cleared_on_exit(self) -> Iterator[None]:
        """Clear the lengths on exit, also after errors: the next forward may have other rows."""
        try:
            yield
        finally:
            self._lengths = {}

    def find(self, streams: Sequence[Stream], num_rows: int, longest: int) -> list[int] | None:
        """Return the lengths of rows padded to `longest` tokens of one of the streams; None where none fits."""
        for stream in streams:
            lengths = self._lengths.get(stream, [])
            if len(lengths) == num_rows and max(lengths) == longest:
                return lengths
        return None


class OwnTokensAttnProcessor:
    """diffusers' `ZSingleStreamAttnProcessor`, with the mask left out wherever the rows' lengths are known."""

    def __init__(self, lengths: RowLengths, streams: Sequence[Stream]) -> None:
        """Attend over `streams`, the block's possible inputs. A mask is used only where lengths match none of them."""
        self._lengths = lengths
        self._streams = streams

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within `hidden_states` [rows, tokens, width]. diffusers passes arguments by these names."""
        # Whole batches: the adapters' hooks on these layers count the rows.
        query = _by_heads(attn.to_q(hidden_states), attn.heads)
        key = _by_heads(attn.to_k(hidden_states), attn.heads)
        value = _by_heads(attn.to_v(hidden_states), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if freqs_cis is not None:
            query, key = _rotated(query, freqs_cis), _rotated(key, freqs_cis)
        lengths = self._lengths.find(self._streams, *query.shape[:2])
        if attention_mask is None:
            attended = _sdpa(query, key, value)
        elif lengths is None:
            attended = _sdpa(query, key, value, attention_mask[:, None, None])
        elif min(lengths) == query.shape[1]:
            attended = _sdpa(query, key, value)
        else:
            attended = _row_by_row(query, key, value, lengths)
        attended = attended.flatten(2)
        for layer in attn.to_out:
            attended = layer(attended)
        return attended


def attend_to_own_tokens(transformer: Any, lengths: RowLengths) -> None:
    """Set the processor on every block of a `ZImageTransformer2DModel`."""
    _set(transformer.noise_refiner, lengths, [Stream.IMAGE])
    _set(transformer.context_refiner, lengths, [Stream.CAPTION])
    _set(transformer.layers, lengths, [Stream.BOTH])


def attend_to_own_tokens_in_controlnet(net: Any, lengths: RowLengths) -> None:
    """Set it on the blocks that a `ZImageControlNetModel` has beside its transformer's."""
    _set(net.control_noise_refiner or [], lengths, [Stream.IMAGE])
    # Some ControlNets refine the image by their layers too. A row of both streams is longer than its image alone.
    _set(net.control_layers, lengths, [Stream.BOTH, Stream.IMAGE])


def _set(blocks: Sequence[Any], lengths: RowLengths, streams: Sequence[Stream]) -> None:
    for block in blocks:
        block.attention.set_processor(OwnTokensAttnProcessor(lengths, streams))


def _by_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.view(*x.shape[:-1], num_heads, -1)


def _rotated(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions: neighbours in [rows, tokens, heads, width] are rotated as complex numbers, in 32 bits."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[:, :, None]).flatten(3).type_as(x)


def _row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Attend row by row, with zeros as padding: it is not read, but must be finite.

    Rows of one length do not share a call. cuDNN makes a plan, in tenths of a second, for each shape and stride: a row
    alone has one plan for its length, whatever its batch.
    """
    longest = query.shape[1]
    padding = query.new_zeros(longest - min(lengths), *query.shape[2:])
    parts = []
    for row, length in enumerate(lengths):
        # Not `[row : row + 1]`, which would keep the batch's stride.
        own = (one[row, :length][None] for one in (query, key, value))
        parts += [_sdpa(*own)[0], padding[: longest - length]]
    # One kernel for all rows.
    return torch.cat(parts).view(query.shape)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Call torch's attention with [rows, tokens, heads, width] each, which torch orders otherwise."""
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
