"""Encode prompts to conditioning: new texts together in one pass of the text encoder, repeated ones from a cache."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from inference.lane import ActiveRequest, Conditioning, Embedding
from inference.models.base import Family
from inference.models.inputs import Prompt

# On the model's device: 500 texts of SD 1.5 in 16 bits, 200 of SDXL, some 150 of Z-Image, 15 of FLUX.1 and of Krea 2.
MAX_CACHED_BYTES = 64_000_000
# More at once would stall the lanes that are denoising.
MAX_TEXTS_PER_PASS = 16

_Key = tuple[Prompt, tuple[tuple[object, float], ...]]


class Conditioner:
    """Owner of the cached embeddings."""

    def __init__(self, model: Family) -> None:
        self._model = model
        self._cache: OrderedDict[_Key, Embedding] = OrderedDict()
        self._num_bytes = 0

    def condition(self, requests: Sequence[ActiveRequest]) -> list[Conditioning]:
        """Return the conditioning of each request, under the adapters in its row."""
        known = self._embeddings([(prompt, active) for active in requests for prompt in _prompts(active)])
        found = []
        for active in requests:
            positive, *negative = (known[self._key(prompt, active)] for prompt in _prompts(active))
            if self._model.is_chunked and negative and len(positive.tokens) != len(negative[0].tokens):
                positive, *negative = self._padded(active, positive, negative[0])
            found.append(Conditioning(positive, negative[0] if negative else None))
        return found

    def _padded(self, active: ActiveRequest, positive: Embedding, negative: Embedding) -> tuple[Embedding, Embedding]:
        """Pad the shorter one with empty chunks to the length of the longer, as compel and A1111 do."""
        # A negative prompt that is left out stays left out over its whole length.
        fillings = [Prompt(""), Prompt("", is_left_out=not active.request.negative_prompt)]
        known = self._embeddings([(filling, active) for filling in fillings])
        longest = max(len(positive.tokens), len(negative.tokens))
        padded = []
        for one, filling in zip((positive, negative), fillings, strict=True):
            chunk = known[self._key(filling, active)].tokens
            num_missing = (longest - len(one.tokens)) // len(chunk)
            padded.append(Embedding(torch.cat([one.tokens, *[chunk] * num_missing]), one.pooled))
        return padded[0], padded[1]

    def _embeddings(self, wanted: Sequence[tuple[Prompt, ActiveRequest]]) -> dict[_Key, Embedding]:
        texts = {self._key(prompt, active): (prompt, active.row) for prompt, active in wanted}
        known = {key: self._cache[key] for key in texts if key in self._cache}
        new = [key for key in texts if key not in known]
        for start in range(0, len(new), MAX_TEXTS_PER_PASS):
            keys = new[start : start + MAX_TEXTS_PER_PASS]
            encoded = self._model.encode([texts[key][0] for key in keys], [texts[key][1] for key in keys])
            for key, one in zip(keys, encoded, strict=True):
                # Copies: a view would keep the whole pass in memory for one text of it.
                known[key] = one.copied()
        for key, embedding in known.items():
            if key not in self._cache:
                self._cache[key] = embedding
                self._num_bytes += _num_bytes(embedding)
            self._cache.move_to_end(key)
        while self._num_bytes > MAX_CACHED_BYTES:
            _, dropped = self._cache.popitem(last=False)
            self._num_bytes -= _num_bytes(dropped)
        return known

    def _key(self, prompt: Prompt, active: ActiveRequest) -> _Key:
        """Return the cache's key: the prompt, and those adapters that change a text encoder."""
        bank, encoders = self._model.bank, self._model.text_encoders
        return prompt, tuple(
            (key, applied.scale)
            for key, applied in zip(active.keys, active.row, strict=True)
            if any(bank.touches(applied, encoder) for encoder in encoders)
        )


def _prompts(active: ActiveRequest) -> tuple[Prompt, ...]:
    positive, negative = Prompt(active.request.prompt), active.request.negative_prompt
    return (positive, Prompt(negative, is_left_out=not negative)) if active.is_guided else (positive,)


def _num_bytes(embedding: Embedding) -> int:
    return sum(part.nbytes for part in embedding.parts)
