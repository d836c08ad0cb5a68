"""Prompts of more than 77 tokens and prompts with weights for the CLIP families, through the library compel."""

import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode

from inference.errors import RequestFailed

# Beyond about 1.6 images degrade; a wider range would only parse more text as weights.
MAX_WEIGHT = 3.0
# Weights are written like "1.25". The bound keeps the parser linear.
MAX_NUMBER_CHARS = 16
# Passes of each text encoder for one text, one row at a time, while the lanes that are denoising wait.
MAX_PASSES = 128

_SYNTAX = re.compile(r"\\[():\\]|[():]")
_NUMBER = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*")
_RATIO = re.compile(r"\s*[0-9]+\s*:\s*[0-9]+\s*")


class Fragment(NamedTuple):
    """A part of a prompt of one weight."""

    text: str
    weight: float


class PromptEmbeddings(NamedTuple):
    """Embedding of a text: `tokens` [chunks · 77, width] and, where the family pools, `pooled` [width]."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None


def parse_weights(prompt: str) -> tuple[Fragment, ...]:
    """Split the prompt into parts of one weight, without the syntax. Linear in its length; any text is a prompt.

    `(a red fox:1.3)` weights its content, as in AUTOMATIC1111's web UI; nested weights multiply, to at most
    `MAX_WEIGHT`. All else is text: parentheses without a number, or with one outside 0 to `MAX_WEIGHT`, or that no
    other closes; square brackets; two whole numbers, which are a ratio or a time: `(16:9)`. A backslash makes the
    `( ) : \\` after it text and goes, but only in a prompt with a weight: one without comes back as it is.
    """
    groups = _find_groups(prompt)
    return _split(prompt, groups) if groups else (Fragment(prompt, 1.0),)


def num_tokens(tokenizer: Any, text: str) -> int:
    """Count the tokens of the text, start and end included."""
    return len(tokenizer(text, verbose=False).input_ids)


class LongPromptEncoder:
    """Encoder, one at a time, of prompts that plain diffusers would truncate or take literally.

    A text of more than 75 tokens is cut into chunks, each encoded alone between a start and an end of its own. A chunk
    ends with the last full stop among the next 75 tokens; where there is none with the last comma, semicolon or colon;
    else with the last word. That is compel's rule, and so are the weights: they move a token's embedding away from the
    empty prompt's or towards it, and below 1 also move all embeddings towards those of the prompt whose other tokens
    do not see that part.

    Nothing is kept between calls, since adapters change the text encoders, and every pass of a text encoder
    has one row: `AdapterBank.route` one row before `encode`.
    """

    def __init__(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any], device: torch.device) -> None:
        """Take one of each for Stable Diffusion 1.x and 2.x, two for SDXL, in the pipeline's order.

        The encoders run on `device`, though they may be offloaded between their passes.
        """
        self._pairs = list(zip(tokenizers, text_encoders, strict=True))
        self._is_pooled = len(self._pairs) > 1
        states = ReturnedEmbeddingsType
        self._make_provider = partial(
            EmbeddingsProvider,
            truncate=False,
            device=device,
            split_long_text_mode=SplitLongTextMode.SENTENCES,
            # As StableDiffusionPipeline and StableDiffusionXLPipeline take them in `encode_prompt`.
            returned_embeddings_type=states.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            if self._is_pooled
            else states.LAST_HIDDEN_STATES_NORMALIZED,
        )
        for tokenizer in tokenizers:
            # transformers warns once for each tokenizer of a text that is too long, which here it is not.
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True

    def is_ordinary(self, text: str) -> bool:
        """Return whether plain diffusers encodes it right: no weights, and no more tokens than any encoder reads."""
        is_plain = parse_weights(text) == (Fragment(text, 1.0),)
        return is_plain and all(num_tokens(one, text) <= one.model_max_length for one, _ in self._pairs)

    def encode(self, text: str) -> PromptEmbeddings:
        """Embed a text, in the text encoders' dtype and on their device; an ordinary one as diffusers' `encode_prompt`.

        SDXL's two encoders share `tokens` side by side; the one with fewer chunks is filled up with the empty prompt's.
        `pooled` ignores weights and all beyond the first 77 tokens. Raises `RequestFailed` above `MAX_PASSES`.
        """
        fragments = parse_weights(text)
        # compel keeps the empty prompt's embedding in the provider: one kept would be another adapter's.
        providers = [self._make_provider(tokenizer, encoder) for tokenizer, encoder in self._pairs]
        for provider in providers:
            _check_passes(provider, fragments)
        embeddings = [_embed(provider, fragments) for provider in providers]
        length = max(map(len, embeddings))
        for index, provider in enumerate(providers):
            if num_missing := (length - len(embeddings[index])) // provider.max_token_count:
                embeddings[index] = torch.cat([embeddings[index], *[provider.empty_z[0]] * num_missing])
        tokens = torch.cat(embeddings, dim=-1)
        if not self._is_pooled:
            return PromptEmbeddings(tokens, None)
        # With spaces, so that its tokens are those of the fragments.
        words = " ".join(fragment.text for fragment in fragments)
        return PromptEmbeddings(tokens, providers[-1].get_pooled_embeddings([words])[0])


class _Group(NamedTuple):
    """A weighted part of a prompt: positions of its "(", its last ":" and its ")"."""

    start: int
    colon: int
    end: int
    weight: float


def _find_groups(prompt: str) -> list[_Group]:
    groups = []
    colons: list[tuple[int, int]] = []
    for found in _SYNTAX.finditer(prompt):
        match found.group():
            case "(":
                colons.append((found.start(), -1))
            case ":" if colons:
                colons[-1] = (colons[-1][0], found.start())
            case ")" if colons:
                start, colon = colons.pop()
                weight = _parse_weight(prompt, start, colon, found.start())
                if weight is not None:
                    groups.append(_Group(start, colon, found.start(), weight))
    return groups


def _parse_weight(prompt: str, start: int, colon: int, end: int) -> float | None:
    if colon <= start + 1 or end - colon > MAX_NUMBER_CHARS:
        return None
    number = _NUMBER.fullmatch(prompt, colon + 1, end)
    is_ratio = end - start <= MAX_NUMBER_CHARS and _RATIO.fullmatch(prompt, start + 1, end)
    if number is None or is_ratio:
        return None
    weight = float(number[1])
    return weight if weight <= MAX_WEIGHT else None


def _split(prompt: str, groups: list[_Group]) -> tuple[Fragment, ...]:
    opened = {group.start: group.weight for group in groups}
    closed = {group.colon: group.end for group in groups}
    weights = [1.0]
    characters: list[tuple[str, float]] = []
    i = 0
    while i < len(prompt):
        if i in opened:
            # Clamped at every level: a hundred levels of 3 around a 0 would overflow to NaN.
            weights.append(min(weights[-1] * opened[i], MAX_WEIGHT))
        elif i in closed:
            weights.pop()
            i = closed[i]
        else:
            # Of the escapes, which are two characters long, only the second one.
            escape = _SYNTAX.match(prompt, i)
            i += len(escape[0]) - 1 if escape else 0
            characters.append((prompt[i], weights[-1]))
        i += 1
    runs = groupby(characters, key=lambda one: one[1])
    return tuple(Fragment("".join(character for character, _ in run), weight) for weight, run in runs)


def _check_passes(provider: Any, fragments: Sequence[Fragment]) -> None:
    """Raise `RequestFailed` above `MAX_PASSES`: compel encodes the whole prompt again for every part below 1."""
    token_ids = _token_ids(provider, fragments)
    num_chunks = math.ceil(sum(map(len, token_ids)) / (provider.max_token_count - 2))
    num_faint = sum(fragment.weight < 1 for fragment in fragments)
    num_passes = num_chunks * (1 + num_faint)
    if num_passes > MAX_PASSES:
        raise RequestFailed(
            "INVALID_PROMPT",
            f"a prompt of {num_chunks} times {provider.max_token_count} tokens with {num_faint} parts weighted below 1 "
            f"takes {num_passes} passes of the text encoder; at most {MAX_PASSES} are made",
        )


def _embed(provider: Any, fragments: Sequence[Fragment]) -> torch.Tensor:
    """Embed the fragments, [chunks · 77, width]."""
    # compel fails on a part without tokens: spaces between two weights.
    encoded = [fragment for fragment, ids in zip(fragments, _token_ids(provider, fragments), strict=True) if ids]
    texts, weights = zip(*(encoded or [Fragment("", 1.0)]), strict=True)
    embeddings = provider.get_embeddings_for_weighted_prompt_fragments(
        [list(texts)], [list(weights)], device=provider.device
    )
    return embeddings[0]  # type: ignore[no-any-return]


def _token_ids(provider: Any, fragments: Sequence[Fragment]) -> list[list[int]]:
    texts = [fragment.text for fragment in fragments]
    return provider.get_token_ids(texts, include_start_and_end_markers=False)  # type: ignore[no-any-return]
