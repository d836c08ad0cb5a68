"""LoRA adapters: one normal form for what diffusers, PEFT and kohya's scripts write."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType

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

Value = TypeVar("Value")

MODELS = ("unet", "text_encoder", "text_encoder_2")
# How a text encoder's layers begin where a file does not say whose they are; all else is the UNet's.
TEXT_ENCODER_ROOTS = ("text_model.", "encoder.")
PEFT_PREFIX = "base_model.model."
# diffusers' own settings, a LoraConfig per model, in the safetensors metadata.
SETTINGS_METADATA = "lora_adapter_metadata"

DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
KOHYA_NAME = re.compile(r"lora_(?:unet|te|te1|te2)_\w+\.lora_(?:down|up)\.weight")
# An alpha's name without ".alpha" is its up tensor's name without one of these.
UP_ENDINGS = (".lora_up.weight", ".lora.up.weight", ".up.weight", ".lora_linear_layer.up.weight", "_lora.up.weight", UP)
# In the tensors' names of DoRA, LoHa, LoKr, LoCon's Tucker form, full differences, IA3, OFT, GLoRA, trained biases.
# Plain diffusers drops some of these and applies the rest.
OTHER_METHODS = re.compile(
    r"dora_scale|magnitude_vector|hada_|lokr_|lora_mid|\.diff(?:_b)?$|ia3_|oft_|\.[ab][12]\.weight$|\.bias$|lora_embedding"
)


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
    "text_encoder.encoder.layers.0…q_proj" (without the "text_model." that older files have in front).
    """

    layers: Mapping[str, LowRank]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights by PEFT's names, which `pipe.load_lora_weights` takes and applies at scale 1."""
        downs = {f"{name}{DOWN}": layer.a for name, layer in self.layers.items()}
        return downs | {f"{name}{UP}": layer.b for name, layer in self.layers.items()}


def read_adapter(weights: Path, config: Path | None = None) -> Adapter:
    """The adapter in a local safetensors file; `config` is the adapter_config.json beside a PEFT folder's weights.

    Raises AdapterUnsafe, AdapterUnsupported or AdapterInvalid: an adapter is read whole or not at all.
    """
    tensors, metadata = read_weights(weights)
    origins = _peft_names((name for name in tensors if not name.endswith(ALPHA)), is_peft_folder=config is not None)
    alphas = _alphas_by_up(tensors)
    scalings = dict.fromkeys(MODELS, read_peft_config(config)) if config else _stated_scalings(metadata)
    if alphas and scalings:
        raise AdapterInvalid("the adapter states its alphas twice, in tensors and in settings")

    layers: dict[str, LowRank] = {}
    for layer in sorted({name.removesuffix(DOWN).removesuffix(UP) for name in origins}):
        pair = _pair(layer, origins, tensors)
        scaling = scalings.get(layer.partition(".")[0])
        alpha = alphas.get(origins[layer + UP], pair.rank)
        scale = scaling.of(layer, rank=pair.rank) if scaling else alpha / pair.rank
        layers[_flat(layer)] = _scaled(pair, scale, layer)
    return Adapter(layers)


def _peft_names(names: Iterable[str], *, is_peft_folder: bool) -> dict[str, str]:
    """The name in the file of every weight, by its normal name: "unet.….lora_A.weight" or "….lora_B.weight".

    diffusers' converters only move the values of a state dict to other names, so they are handed names for values.
    """
    state = {name: name for name in names}
    if not state:
        raise AdapterInvalid("the adapter holds no weights")
    if others := [name for name in state if OTHER_METHODS.search(name)]:
        raise AdapterUnsupported(f"the adapter is not plain LoRA: {listed(others)}")
    if any(name.startswith(PEFT_PREFIX) != is_peft_folder for name in state):
        raise AdapterInvalid("weights named by PEFT need their adapter_config.json, and no others have one")

    unified = _from_kohya(state) if any(KOHYA_NAME.fullmatch(name) for name in state) else state
    normal: dict[str, str] = {}
    for model, own in _by_model(unified).items():
        convert = convert_unet_state_dict_to_peft if model == "unet" else _text_encoder_names
        normal |= {f"{model}.{name}": origin for name, origin in convert(own).items()}

    if unknown := [origin for name, origin in normal.items() if not name.endswith((DOWN, UP))]:
        raise AdapterUnsupported(f"the adapter holds weights of an unknown kind: {listed(unknown)}")
    if len({_flat(name) for name in normal}) < len(state):
        raise AdapterInvalid("the adapter holds two weights for the same place")
    return normal


def _from_kohya(state: dict[str, str]) -> dict[str, str]:
    if strangers := [name for name in state if not KOHYA_NAME.fullmatch(name)]:
        raise AdapterUnsupported(f"the adapter holds weights of an unknown kind: {listed(strangers)}")
    try:
        converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(state))
    except (KeyError, ValueError) as error:
        raise AdapterInvalid("the adapter's layers are named oddly, or one lacks half of its weights") from error
    return dict(converted)


def _text_encoder_names(state: dict[str, str]) -> dict[str, str]:
    # Stating the type, because the converter's guess fails for adapters without an attention output. This one also
    # covers the newer names.
    return dict(convert_state_dict_to_peft(state, original_type=StateDictType.DIFFUSERS_OLD))


def _by_model(entries: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """The entries of each model under their names within it; an unclaimed name belongs to the UNet."""
    split: dict[str, dict[str, Value]] = {}
    for name, entry in entries.items():
        bare = name.removeprefix(PEFT_PREFIX)
        model, _, rest = bare.partition(".")
        if model not in MODELS:
            model, rest = ("text_encoder" if bare.startswith(TEXT_ENCODER_ROOTS) else "unet"), bare
        split.setdefault(model, {})[rest] = entry
    return split


def _flat(layer: str) -> str:
    """The name without the level that transformers dropped from its CLIP text model: files have it or not."""
    return re.sub(r"^text_encoder\.text_model\.", "text_encoder.", layer)


def _alphas_by_up(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The alpha tensors' values by the names of the up weights they belong to."""
    alphas: dict[str, float] = {}
    for name in (name for name in tensors if name.endswith(ALPHA)):
        ups = [up for ending in UP_ENDINGS if (up := name.removesuffix(ALPHA) + ending) in tensors]
        if len(ups) != 1 or ups[0] in alphas or tensors[name].numel() != 1:
            raise AdapterInvalid(f"{name} is not the one number of one layer")
        alphas[ups[0]] = checked_alpha(float(tensors[name].item()))
    return alphas


def _stated_scalings(metadata: Mapping[str, str]) -> dict[str, Scaling]:
    if SETTINGS_METADATA not in metadata:
        return {}
    settings = parse_object(metadata[SETTINGS_METADATA], f"the adapter's {SETTINGS_METADATA}")
    return {model: parse_scaling(own) for model, own in _by_model(settings).items()}


def _pair(layer: str, origins: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> LowRank:
    if layer + DOWN not in origins or layer + UP not in origins:
        raise AdapterInvalid(f"{layer} lacks one of its two weights")
    a, b = tensors[origins[layer + DOWN]], tensors[origins[layer + UP]]
    if a.ndim not in (2, 4) or a.ndim != b.ndim or a.shape[0] != b.shape[1] or b.shape[2:].numel() != 1:
        raise AdapterInvalid(
            f"{layer} has weights of shapes {list(a.shape)} and {list(b.shape)}, which do not multiply"
        )
    if not 1 <= a.shape[0] <= MAX_RANK or 0 in (*a.shape, *b.shape):
        raise AdapterInvalid(f"{layer} is of rank {a.shape[0]} or empty; ranks from 1 to {MAX_RANK} are accepted")
    return LowRank(a, b)


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
