"""LoRA adapters: one normal form for what the training scripts of each model family write."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inference.adapter_files import (
    MAX_RANK,
    AdapterError,
    AdapterIncompatible,
    AdapterInvalid,
    AdapterUnsafe,
    AdapterUnsupported,
    Scaling,
    checked_alpha,
    listed,
    parse_object,
    parse_scaling,
    read_peft_config,
    read_weights,
)
from inference.dialects import DOWN, PEFT_PREFIX, UP, Dialect, stem_and_half

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterIncompatible",
    "AdapterInvalid",
    "AdapterUnsafe",
    "AdapterUnsupported",
    "LowRank",
    "check_fits",
    "read_adapter",
]

# diffusers' own settings, a LoraConfig per model, in the safetensors metadata.
SETTINGS_METADATA = "lora_adapter_metadata"
ALPHA = ".alpha"
# What may stand between a layer's stem and ".alpha", or, in the oldest files, is missing there.
ALPHA_INFIXES = (".lora", ".lora_linear_layer")
# By what is in the names of their tensors. Plain diffusers drops some of these and applies the rest.
OTHER_METHODS = {
    "DoRA": re.compile(r"dora_scale|magnitude_vector"),
    "LoHa": re.compile(r"hada_"),
    "LoKr": re.compile(r"lokr_"),
    "LoCon in Tucker form": re.compile(r"lora_mid"),
    "IA3": re.compile(r"ia3_"),
    "OFT": re.compile(r"oft_"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "full differences of weights": re.compile(r"\.diff(?:_b)?$"),
    "trained biases": re.compile(r"\.bias$"),
    "trained embeddings": re.compile(r"lora_embedding"),
}


class Halves(NamedTuple):
    """The names of a layer's two weights in the file."""

    down: str
    up: str


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight: scale · b @ a, for a Conv2d over flattened kernels.

    a: [rank, in] or [rank, in, height, width]; b: [out, rank] or [out, rank, 1, 1]; both of one floating dtype, finite.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter with every alpha folded into b, so that it is applied as b @ a at scale 1.

    layers: keyed by model and layer as the loaded pipeline names them: "unet.down_blocks.0…to_q",
    "text_encoder.encoder.layers.0…q_proj", "text_encoder_2.text_model.encoder…", "transformer.layers.0.attention.to_q".
    """

    layers: Mapping[str, LowRank]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights by PEFT's names, which `pipe.load_lora_weights` takes and applies at scale 1."""
        downs = {f"{name}{DOWN}": layer.a for name, layer in self.layers.items()}
        return downs | {f"{name}{UP}": layer.b for name, layer in self.layers.items()}


def read_adapter(weights: Path, config: Path | None, dialect: Dialect) -> Adapter:
    """The adapter in a local safetensors file; `config` is the adapter_config.json beside a PEFT folder's weights.

    Raises AdapterUnsafe, AdapterUnsupported, AdapterInvalid or, where the names alone tell that it was made for another
    model, AdapterIncompatible: an adapter is read whole or not at all.
    """
    tensors, metadata = read_weights(weights)
    stored = _halves_by_stem(name for name in tensors if not name.endswith(ALPHA))
    if any(stem.startswith(PEFT_PREFIX) != (config is not None) for stem in stored):
        raise AdapterInvalid("weights named by PEFT need their adapter_config.json, and no others have one")

    alphas = _alphas_by_stem(tensors, stored)
    scalings = dict.fromkeys(dialect.models, read_peft_config(config)) if config else _stated(metadata, dialect)
    if alphas and scalings:
        raise AdapterInvalid("the adapter states its alphas twice, in tensors and in settings")

    layers: dict[str, LowRank] = {}
    for stem, name in sorted(dialect.layer_names(stored).items(), key=itemgetter(1)):
        pair = _pair(name, tensors[stored[stem].down], tensors[stored[stem].up])
        scaling = scalings.get(dialect.owner(name).model)
        alpha = alphas.get(stem, pair.rank)
        # The settings' patterns are about the names in the file.
        scale = scaling.of(stem.removeprefix(PEFT_PREFIX), rank=pair.rank) if scaling else alpha / pair.rank
        layers |= _parts(dialect.parts_of(name), _scaled(pair, scale, name))
    return Adapter(layers)


def _halves_by_stem(names: Iterable[str]) -> dict[str, Halves]:
    """The names of every layer's weights, by its stem. Raises unless all are of plain LoRA and come in pairs."""
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        _refuse_other_methods(name)
        if (found := stem_and_half(name)) is None:
            unknown.append(name)
        elif (ups if found.is_up else downs).setdefault(found.stem, name) != name:
            raise AdapterInvalid(f"the adapter holds two weights for the same place: {name}")

    if unknown:
        raise AdapterUnsupported(f"the adapter holds weights of an unknown kind: {listed(unknown)}")
    if not downs and not ups:
        raise AdapterInvalid("the adapter holds no weights")
    if lonely := downs.keys() ^ ups.keys():
        raise AdapterInvalid(f"layers lack one of their two weights: {listed(lonely)}")
    return {stem: Halves(downs[stem], ups[stem]) for stem in downs}


def _refuse_other_methods(name: str) -> None:
    for method, pattern in OTHER_METHODS.items():
        if pattern.search(name):
            raise AdapterUnsupported(f"the adapter is not plain LoRA but has {method}: {name}")


def _alphas_by_stem(tensors: Mapping[str, torch.Tensor], stems: Collection[str]) -> dict[str, float]:
    """The alpha tensors' values by the stems of the layers they belong to."""
    alphas: dict[str, float] = {}
    for name in (name for name in tensors if name.endswith(ALPHA)):
        bare = name.removesuffix(ALPHA)
        candidates = {bare, f"{bare}_lora", *(bare.removesuffix(infix) for infix in ALPHA_INFIXES)}
        owners = [stem for stem in candidates if stem in stems]
        if len(owners) != 1 or owners[0] in alphas or tensors[name].numel() != 1:
            raise AdapterInvalid(f"{name} is not the one number of one layer")
        alphas[owners[0]] = checked_alpha(float(tensors[name].item()))
    return alphas


def _stated(metadata: Mapping[str, str], dialect: Dialect) -> dict[str, Scaling]:
    """The scalings in diffusers' own settings, by model."""
    if SETTINGS_METADATA not in metadata:
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for name, value in parse_object(metadata[SETTINGS_METADATA], f"the adapter's {SETTINGS_METADATA}").items():
        model, setting = dialect.owner(name)
        settings.setdefault(model, {})[setting] = value
    return {model: parse_scaling(own) for model, own in settings.items()}


def _pair(layer: str, a: torch.Tensor, b: torch.Tensor) -> LowRank:
    if a.ndim not in (2, 4) or a.ndim != b.ndim or a.shape[0] != b.shape[1] or b.shape[2:].numel() != 1:
        raise AdapterInvalid(
            f"{layer} has weights of shapes {list(a.shape)} and {list(b.shape)}, which do not multiply"
        )
    if not 1 <= a.shape[0] <= MAX_RANK or 0 in (*a.shape, *b.shape):
        raise AdapterInvalid(f"{layer} is of rank {a.shape[0]} or empty; ranks from 1 to {MAX_RANK} are accepted")
    return LowRank(a, b)


def _parts(names: Sequence[str], layer: LowRank) -> dict[str, LowRank]:
    """Layers that were fused have one A, and as many rows of B each: taken apart, they are what they were."""
    if layer.b.shape[0] % len(names):
        raise AdapterInvalid(f"a layer of {layer.b.shape[0]} outputs cannot be {' and '.join(names)} in one")
    return {name: LowRank(layer.a, b) for name, b in zip(names, layer.b.chunk(len(names)), strict=True)}


def _scaled(pair: LowRank, scale: float, layer: str) -> LowRank:
    """The pair with `scale` folded into b: as stored where that changes nothing, else in 32 bits."""
    if scale != 1.0 or pair.a.dtype != pair.b.dtype:
        pair = LowRank(pair.a.float(), pair.b.float() * scale)
    if not (_is_finite(pair.a) and _is_finite(pair.b)):
        raise AdapterInvalid(f"{layer} holds weights that are not finite")
    return pair


def _is_finite(weight: torch.Tensor) -> bool:
    # NaN and infinities survive a sum, which takes a tenth of isfinite's time. Should finite weights overflow it, they
    # are no weights anyone trained.
    return math.isfinite(weight.sum(dtype=torch.float32).item())


def check_fits(adapter: Adapter, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raises AdapterIncompatible unless every layer names a Linear or Conv2d of its shape.

    modules: the pipeline's models by name, {"unet": pipe.unet, "text_encoder": pipe.text_encoder}.
    """
    known = {f"{model}.{name}": module for model, root in modules.items() for name, module in root.named_modules()}
    if misfits := [name for name, layer in adapter.layers.items() if not _fits(layer, known.get(name))]:
        raise AdapterIncompatible(f"the adapter was made for another model; these layers do not fit: {listed(misfits)}")


def _fits(layer: LowRank, module: torch.nn.Module | None) -> bool:
    if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
        return False
    return layer.a.shape[1:] == module.weight.shape[1:] and layer.b.shape[0] == module.weight.shape[0]
