"""Sort the tensor names of an adapter file: low-rank pairs, their scales, and those of other methods.

A layer's stem is the common part of the names of its two weights and its alpha.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from inference.lora.errors import AdapterInvalid, AdapterUnsupported, listed, shown

ALPHA, SCALAR = ".alpha", ".scalar"

# In the oldest diffusers files, and in X-Labs' of FLUX.1, the layer's own name ends in _lora, or in _lora1 and _lora2,
# and stays so in the stem. Before ".weight" PEFT
# keeps the adapter's name, which may be any text without a dot; ".lora" is left of a module that wraps the layer.
WEIGHT = re.compile(
    r"(?P<stem>.+?)(?:(?:\.lora)?\.lora_(?:linear_layer\.)?|\.lora\.|(?<=_lora)\.|(?<=_lora[12])\.)(?P<half>A|B|down|up)"
    r"(?:\.(?P<adapter>[^.]+))?\.weight",
    re.DOTALL,
)
# Patterns in the names of their tensors. Plain diffusers drops some of these and applies the rest.
OTHER_METHODS = {
    "DoRA": r"dora_scale|\bmagnitude\b|magnitude_vector",
    "LoHa": r"hada_",
    "LoKr": r"lokr_",
    "LoCon in Tucker form": r"lora_mid",
    "AdaLoRA": r"\.lora_E\b|\.ranknum\b",
    "VeRA": r"\.vera_|\.vblora_",
    "IA3": r"ia3_|\.on_input$",
    "OFT": r"oft_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "trained norms": r"\.[wb]_norm$",
    "full differences of weights": r"\.diff(?:_b)?$|\.(?:re)?set_weight$|\.reshape_weight$",
    "trained biases": r"\.bias$",
    "trained embeddings": r"lora_embedding",
    "an embedding (textual inversion)": r"^bundle_emb\b|^(?:.*\.)?emb_params$|string_to_param|^clip_[lg]$|^<.*>$",
    "the numbered layers of an IP-Adapter": r"^\d+\.to_|^ip_adapter\.|^image_proj\.",
    "a control network": r"^lora_controlnet$",
}
_METHOD = re.compile("|".join(f"({pattern})" for pattern in OTHER_METHODS.values()))
_METHOD_NAMES = tuple(OTHER_METHODS)


class Halves(NamedTuple):
    """The names of a layer's two weights in the file."""

    down: str
    up: str


@dataclass(frozen=True)
class SortedNames:
    """The tensors of plain LoRA: pairs by stem, and the tensors named *.alpha and *.scalar by the part before it."""

    halves: dict[str, Halves]
    alphas: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)


def sort_names(names: Iterable[str]) -> SortedNames:
    """Sort the names of a file's tensors.

    Raises AdapterUnsupported unless all are of plain LoRA; AdapterInvalid unless they are pairs of one adapter.
    """
    names = sorted(names)
    for name in names:
        if method := _METHOD.search(name):
            kind = _METHOD_NAMES[(method.lastindex or 1) - 1]
            raise AdapterUnsupported(f"the adapter is not plain LoRA but has {kind}: {shown(name)}")
    alphas = {name.removesuffix(ALPHA): name for name in names if name.endswith(ALPHA)}
    scalars = {name.removesuffix(SCALAR): name for name in names if name.endswith(SCALAR)}
    return SortedNames(_paired(name for name in names if not name.endswith((ALPHA, SCALAR))), alphas, scalars)


def _paired(names: Iterable[str]) -> dict[str, Halves]:
    """Pair the weights by their stems."""
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    unknown: list[str] = []
    adapters: set[str] = set()
    for name in names:
        if (found := WEIGHT.fullmatch(name)) is None:
            unknown.append(name)
            continue
        half = ups if found["half"] in ("B", "up") else downs
        if half.setdefault(found["stem"], name) != name:
            raise AdapterInvalid(f"the adapter holds two weights for the same place: {shown(name)}")
        adapters |= {found["adapter"]} - {None}

    if unknown:
        raise AdapterUnsupported(f"the adapter holds weights of an unknown kind: {listed(unknown)}")
    if not downs and not ups:
        raise AdapterInvalid("the adapter holds no weights")
    if len(adapters) > 1:
        raise AdapterInvalid(f"the file holds several adapters: {listed(adapters)}; store each in a file of its own")
    if lonely := downs.keys() ^ ups.keys():
        raise AdapterInvalid(f"layers lack one of their two weights: {listed(lonely)}")
    return {stem: Halves(downs[stem], ups[stem]) for stem in downs}
