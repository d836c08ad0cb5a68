"""Prompts to conditioning: all new texts in one pass of the text encoder, repeated ones from memory."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from inference.bank import AdapterBank, Applied, Row
from inference.lane import Conditioning, Drawing

# SD 1.5 takes 236 kB a text in fp32.
MAX_REMEMBERED = 256
# More at once would stall the lanes that are denoising.
MAX_TEXTS_PER_PASS = 16
TEXT_ENCODER = "text_encoder"

_Key = tuple[str, tuple[tuple[object, float], ...]]


class Conditioner:
    """Owner of the remembered embeddings."""

    def __init__(self, encode: Callable[[Sequence[str], Sequence[Row]], torch.Tensor], bank: AdapterBank) -> None:
        self._encode = encode
        self._bank = bank
        self._remembered: OrderedDict[_Key, torch.Tensor] = OrderedDict()

    def condition(self, drawings: Sequence[Drawing]) -> list[Conditioning]:
        """The conditioning of each drawing, under the adapters in its row."""
        texts = {self._key(text, drawing): (text, drawing.row) for drawing in drawings for text in _texts(drawing)}
        embeddings = self._embeddings(texts)
        found = []
        for drawing in drawings:
            positive, *negative = (embeddings[self._key(text, drawing)] for text in _texts(drawing))
            found.append(Conditioning(positive, negative[0] if negative else None))
        return found

    def _embeddings(self, texts: dict[_Key, tuple[str, Row]]) -> dict[_Key, torch.Tensor]:
        known = {key: self._remembered[key] for key in texts if key in self._remembered}
        new = [key for key in texts if key not in known]
        for start in range(0, len(new), MAX_TEXTS_PER_PASS):
            keys = new[start : start + MAX_TEXTS_PER_PASS]
            encoded = self._encode([texts[key][0] for key in keys], [texts[key][1] for key in keys])
            # Clones: a view would keep the whole pass in memory for one text of it.
            known |= {key: embedding.clone() for key, embedding in zip(keys, encoded, strict=True)}
        self._remember(known)
        return known

    def _remember(self, embeddings: dict[_Key, torch.Tensor]) -> None:
        for key, embedding in embeddings.items():
            self._remembered[key] = embedding
            self._remembered.move_to_end(key)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _key(self, text: str, drawing: Drawing) -> _Key:
        """A text means the same under adapters that leave the text encoder alone."""
        files = zip(drawing.keys, drawing.row, strict=True)
        return text, tuple((key, applied.scale) for key, applied in files if self._changes_text(applied))

    def _changes_text(self, applied: Applied) -> bool:
        return self._bank.touches(applied, TEXT_ENCODER)


def _texts(drawing: Drawing) -> tuple[str, ...]:
    request = drawing.request
    return (request.prompt, request.negative_prompt) if drawing.is_guided else (request.prompt,)
