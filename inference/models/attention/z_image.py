"""Z-Image's attention, computed row by row over each row's own tokens.

Rows of a batch differ in length by their captions and image sizes, and diffusers masks the padding of the shorter ones,
which excludes torch's fastest kernels. The lengths of the rows are known on the host.

A compiled block calls the attention as one operator, `darkroom::attend_within_rows`, which finds the lengths when it
runs: as Python numbers they would be constants of the graph, and each batch would compile another.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from inference.lora.products.adapted_layers import project
from inference.models.attention.heads import attend, by_heads, rotated


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
        # By which the operator finds this processor.
        self._number = next(_NUMBERS)
        _PROCESSORS[self._number] = self

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within `hidden_states` [rows, tokens, width]. diffusers passes arguments by these names."""
        # Whole batches: the adapters of these layers are those of all rows.
        projected = project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        query, key, value = (by_heads(one, attn.heads) for one in projected)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if freqs_cis is not None:
            query, key = rotated(query, freqs_cis), rotated(key, freqs_cis)
        if torch.compiler.is_compiling():
            attended: torch.Tensor = torch.ops.darkroom.attend_within_rows(
                query, key, value, attention_mask, self._number
            )
        else:
            attended = self.attend(query, key, value, attention_mask)
        attended = attended.flatten(2)
        for layer in attn.to_out:
            attended = layer(attended)
        return attended

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend, [rows, tokens, heads, width] each. `mask` [rows, tokens] is True at the rows' own tokens."""
        if mask is None:
            return attend(query, key, value)
        lengths = self._lengths.find(self._streams, *query.shape[:2])
        if lengths is None:
            return attend(query, key, value, mask[:, None, None])
        if min(lengths) == query.shape[1]:
            return attend(query, key, value)
        return _row_by_row(query, key, value, lengths)


_NUMBERS = itertools.count()
_PROCESSORS: WeakValueDictionary[int, OwnTokensAttnProcessor] = WeakValueDictionary()


def _attend_within_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, processor: int
) -> torch.Tensor:
    return _PROCESSORS[processor].attend(query, key, value, mask).contiguous()


# By hand: `torch.library.custom_op` takes six times as long a call.
_LIBRARY: Any = torch.library.Library("darkroom", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("attend_within_rows(Tensor query, Tensor key, Tensor value, Tensor? mask, int processor) -> Tensor")
_LIBRARY.impl("attend_within_rows", _attend_within_rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "darkroom::attend_within_rows",
    lambda query, key, value, mask, processor: torch.empty_like(query, memory_format=torch.contiguous_format),
    lib=_LIBRARY,
)


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
    # One for all of them: with one each, every block would be compiled for itself.
    processor = OwnTokensAttnProcessor(lengths, streams)
    for block in blocks:
        block.attention.set_processor(processor)


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
        parts += [attend(*own)[0], padding[: longest - length]]
    # One kernel for all rows.
    return torch.cat(parts).view(query.shape)
