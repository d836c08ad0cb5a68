"""Prompts to conditioning: all new texts in one pass of the text encoder, repeated ones from memory."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from inference.lane import ActiveRequest, Conditioning, Embedding
from inference.lora.bank import AppliedAdapter
from inference.models.base import Family, Prompt

# On the model's device: 500 texts of SD 1.5 in 16 bits, 200 of SDXL, some 150 of Z-Image.
MAX_REMEMBERED_BYTES = 64_000_000
# More at once would stall the lanes that are denoising.
MAX_TEXTS_PER_PASS = 16

_Key = tuple[Prompt, tuple[tuple[object, float], ...]]


class Conditioner:
    """Owner of the remembered embeddings."""

    def __init__(self, model: Family) -> None:
        self._model = model
        self._remembered: OrderedDict[_Key, Embedding] = OrderedDict()
        self._num_bytes = 0

    def condition(self, requests: Sequence[ActiveRequest]) -> list[Conditioning]:
        """The conditioning of each drawing, under the adapters in its row."""
        known = self._embeddings([(prompt, active) for active in requests for prompt in _prompts(active)])
        found = []
        for active in requests:
            positive, *negative = (known[self._key(prompt, active)] for prompt in _prompts(active))
            if self._model.is_chunked and negative and len(positive.tokens) != len(negative[0].tokens):
                positive, *negative = self._evened(active, positive, negative[0])
            found.append(Conditioning(positive, negative[0] if negative else None))
        return found

    def _evened(self, active: ActiveRequest, positive: Embedding, negative: Embedding) -> tuple[Embedding, Embedding]:
        """Both as long as the longer one, the other filled up with empty chunks: so do compel and A1111."""
        # A negative prompt that is left out stays left out over its whole length.
        fillings = [Prompt(""), Prompt("", is_left_out=not active.request.negative_prompt)]
        known = self._embeddings([(filling, active) for filling in fillings])
        longest = max(len(positive.tokens), len(negative.tokens))
        evened = [
            _filled(one, known[self._key(filling, active)].tokens, longest)
            for one, filling in zip((positive, negative), fillings, strict=True)
        ]
        return evened[0], evened[1]

    def _embeddings(self, wanted: Sequence[tuple[Prompt, ActiveRequest]]) -> dict[_Key, Embedding]:
        texts = {self._key(prompt, active): (prompt, active.row) for prompt, active in wanted}
        known = {key: self._remembered[key] for key in texts if key in self._remembered}
        new = [key for key in texts if key not in known]
        for start in range(0, len(new), MAX_TEXTS_PER_PASS):
            keys = new[start : start + MAX_TEXTS_PER_PASS]
            encoded = self._model.encode([texts[key][0] for key in keys], [texts[key][1] for key in keys])
            known |= {key: _own(embedding) for key, embedding in zip(keys, encoded, strict=True)}
        self._remember(known)
        return known

    def _remember(self, embeddings: dict[_Key, Embedding]) -> None:
        for key, embedding in embeddings.items():
            if key not in self._remembered:
                self._remembered[key] = embedding
                self._num_bytes += _num_bytes(embedding)
            self._remembered.move_to_end(key)
        while self._num_bytes > MAX_REMEMBERED_BYTES:
            _, dropped = self._remembered.popitem(last=False)
            self._num_bytes -= _num_bytes(dropped)

    def _key(self, prompt: Prompt, active: ActiveRequest) -> _Key:
        """A text means the same under adapters that leave the text encoders alone."""
        files = zip(active.keys, active.row, strict=True)
        return prompt, tuple((key, applied.scale) for key, applied in files if self._changes_text(applied))

    def _changes_text(self, applied: AppliedAdapter) -> bool:
        return any(self._model.bank.touches(applied, encoder) for encoder in self._model.text_encoders)


def _prompts(active: ActiveRequest) -> tuple[Prompt, ...]:
    positive, negative = Prompt(active.request.prompt), active.request.negative_prompt
    return (positive, Prompt(negative, is_left_out=not negative)) if active.is_guided else (positive,)


def _filled(embedding: Embedding, filling: torch.Tensor, length: int) -> Embedding:
    """`embedding` and as many fillings behind it as make it `length` tokens long."""
    num_missing = (length - len(embedding.tokens)) // len(filling)
    return Embedding(torch.cat([embedding.tokens, *[filling] * num_missing]), embedding.pooled)


def _own(embedding: Embedding) -> Embedding:
    """A copy: a view would keep the whole pass in memory for one text of it."""
    pooled = embedding.pooled
    return Embedding(embedding.tokens.clone(), None if pooled is None else pooled.clone())


def _num_bytes(embedding: Embedding) -> int:
    parts = [embedding.tokens] if embedding.pooled is None else [embedding.tokens, embedding.pooled]
    return sum(_bytes_of(part) for part in parts)


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
