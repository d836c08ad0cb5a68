"""Read LoRA adapter files of all training scripts into one normal form, and check that they fit the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from inference.lora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported, listed, shown
from inference.lora.files import open_weights, parse_object
from inference.lora.names.key_names import PEFT_PREFIX, KeyNaming
from inference.lora.peft_config import MAX_RANK, Scaling, checked_alpha, parse_scaling, read_peft_config
from inference.lora.tensor_names import SortedNames, sort_names

# diffusers' own settings, a LoraConfig per model, in the safetensors metadata.
SETTINGS_METADATA = "lora_adapter_metadata"
# Between a layer's stem and ".alpha" in some files; in the oldest it is missing there.
ALPHA_INFIXES = (".lora", ".lora_linear_layer")
# Of what is stored in other types, 32 bits hold all that the model computes with.
COMPUTED_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
# The denoiser's layers that nearly every adapter changes, whatever the family.
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")


@dataclass(frozen=True)
class LowRank:
    """The low-rank change of one layer's weight: b @ a, for a Conv2d over flattened kernels.

    a: [rank, in] or [rank, in, height, width]; b: [out, rank] or [out, rank, 1, 1]. Both are finite and of one floating
    dtype once they are `scaled`. A Linear's may have kernels of one pixel, and a 1x1 convolution's none: it is the same
    matrix.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def scaled(self, scale: float, layer: str) -> "LowRank":
        """Fold `scale` into b: as stored where that changes nothing, otherwise in 32 bits.

        AdapterInvalid, which names `layer`, where the weights are not finite.
        """
        is_unchanged = scale == 1.0 and self.a.dtype == self.b.dtype and self.a.dtype in COMPUTED_DTYPES
        folded = self if is_unchanged else LowRank(self.a.float(), self.b.float() * scale)
        if not (_is_finite(folded.a) and _is_finite(folded.b)):
            raise AdapterInvalid(f"{layer} holds weights that are not finite")
        return folded

    def split(self, shares: Mapping[str, int]) -> dict[str, "LowRank"]:
        """Split a fused layer by name: its parts share A, and have their shares of the rows of B.

        AdapterInvalid where the rows cannot be shared so.
        """
        rows, rest = divmod(self.b.shape[0], sum(shares.values()))
        if rest:
            raise AdapterInvalid(f"a layer of {self.b.shape[0]} outputs cannot be {' and '.join(shares)} in one")
        parts = torch.split(self.b, [rows * share for share in shares.values()])
        return {name: LowRank(self.a, b) for name, b in zip(shares, parts, strict=True)}

    def with_halves_swapped(self) -> "LowRank":
        """Return it with the halves of the rows of B exchanged."""
        return LowRank(self.a, self.b.roll(self.b.shape[0] // 2, 0))

    def fits(self, module: torch.nn.Module | None) -> bool:
        """Return whether `module` is a Linear or Conv2d of the layer's shape."""
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            return False
        shape = weight_shape(module)
        return self.b.shape[0] == shape[0] and _input_shape(self.a.shape) == _input_shape(shape)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter with every alpha folded into b, so that it is applied as b @ a at scale 1.

    layers: keyed by model and layer as the loaded pipeline names them: "unet.down_blocks.0…to_q",
    "text_encoder.encoder.layers.0…q_proj", "text_encoder_2.text_model.encoder…", "transformer.layers.0.attention.to_q".
    """

    layers: Mapping[str, LowRank]


def blank_adapter(models: Mapping[str, torch.nn.Module]) -> Adapter:
    """Return an adapter of zeros for the attention layers alone, so that the bank's pages keep their width."""
    layers = {
        f"{model}.{name}": module
        for model, root in models.items()
        for name, module in root.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(ATTENTION)
    }
    zeros = {
        name: LowRank(torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1))
        for name, module in layers.items()
    }
    return Adapter(zeros)


def read_adapter(weights: Path, config: Path | None, naming: KeyNaming) -> Adapter:
    """Read the adapter in a local safetensors file; `config` is the adapter_config.json of a PEFT folder.

    Raises AdapterUnsafe, AdapterUnsupported, AdapterInvalid or, where the names alone show another base model,
    AdapterIncompatible: an adapter is read whole or not at all.
    """
    file = open_weights(weights)
    names = sort_names(file.entries)
    layer_names = naming.layer_names(names.halves)
    tensors = file.load(names.halves)

    alphas = _alphas_by_stem(tensors, names, naming)
    scalings = (
        dict.fromkeys(naming.models, read_peft_config(config)) if config else _metadata_scalings(file.metadata, naming)
    )
    if alphas and scalings:
        raise AdapterInvalid("the adapter states its alphas twice, in tensors and in settings")
    if not alphas and not scalings and any(stem.startswith(PEFT_PREFIX) for stem in names.halves):
        raise AdapterInvalid("weights named by PEFT need the adapter_config.json that states their scale beside them")

    layers: dict[str, LowRank] = {}
    for stem, name in sorted(layer_names.items(), key=itemgetter(1)):
        pair = _pair(name, tensors[names.halves[stem].down], tensors[names.halves[stem].up])
        if pair is None:
            continue
        scaling = scalings.get(naming.owner(name).model)
        alpha = alphas.get(stem, pair.rank)
        # The settings' patterns are about the names in the file.
        scale = scaling.of(stem.removeprefix(PEFT_PREFIX), rank=pair.rank) if scaling else alpha / pair.rank
        folded = pair.scaled(scale * _scalar(tensors, names, stem), name)
        if name.endswith(naming.swapped):
            folded = folded.with_halves_swapped()
        layers |= folded.split(naming.parts_of(name))
    if not layers:
        raise AdapterInvalid("the adapter holds no weights: all of its layers are of rank 0")
    return Adapter(layers)


def _alphas_by_stem(tensors: Mapping[str, torch.Tensor], names: SortedNames, naming: KeyNaming) -> dict[str, float]:
    """Return the values of the alpha tensors by the stems of their layers.

    An alpha without weights, as tools that remove layers leave, is ignored; one whose layer has its weights under
    another name is refused.
    """
    alphas: dict[str, float] = {}
    layers = set(naming.layer_names(names.halves).values())
    for bare, name in names.alphas.items():
        candidates = {bare, f"{bare}_lora", *(bare.removesuffix(infix) for infix in ALPHA_INFIXES)}
        owners = [stem for stem in candidates if stem in names.halves]
        is_alone = False
        if not owners:
            is_inside = any(bare.startswith(f"{stem}.") for stem in names.halves)
            is_alone = not is_inside and naming.layer_name(bare) not in layers
        if tensors[name].numel() != 1 or (not is_alone and (len(owners) != 1 or owners[0] in alphas)):
            raise AdapterInvalid(f"{shown(name)} is not the one number of one layer")
        alpha = checked_alpha(float(tensors[name].item()))
        alphas |= dict.fromkeys(owners, alpha)
    return alphas


def _scalar(tensors: Mapping[str, torch.Tensor], names: SortedNames, stem: str) -> float:
    """Return the factor that early LyCORIS trained per layer beside its alpha; 1 where there is none."""
    if stem not in names.scalars:
        return 1.0
    scalar = tensors[names.scalars[stem]]
    if scalar.numel() != 1:
        raise AdapterInvalid(f"{shown(names.scalars[stem])} is not the one number of one layer")
    return checked_alpha(float(scalar.item()))


def _metadata_scalings(metadata: Mapping[str, str], naming: KeyNaming) -> dict[str, Scaling]:
    """Parse the scalings in diffusers' own metadata, by model."""
    if SETTINGS_METADATA not in metadata:
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for name, value in parse_object(metadata[SETTINGS_METADATA], f"the adapter's {SETTINGS_METADATA}").items():
        model, setting = naming.owner(name)
        settings.setdefault(model, {})[setting] = value
    return {model: parse_scaling(own) for model, own in settings.items()}


def _pair(layer: str, a: torch.Tensor, b: torch.Tensor) -> LowRank | None:
    """Return the layer's unscaled weights; None for rank 0, as tools that shrink adapters leave."""
    if not {a.ndim, b.ndim} <= {2, 4} or a.shape[0] != b.shape[1] or b.shape[2:].numel() != 1:
        raise AdapterInvalid(
            f"{layer} has weights of shapes {list(a.shape)} and {list(b.shape)}, which do not multiply"
        )
    if a.shape[0] > MAX_RANK or 0 in (*a.shape[1:], *b.shape[::2]):
        raise AdapterInvalid(f"{layer} is of rank {a.shape[0]} or empty; ranks up to {MAX_RANK} are accepted")
    return LowRank(a, b) if a.shape[0] else None


def _is_finite(weight: torch.Tensor) -> bool:
    # NaN and infinities survive a sum, which takes a tenth of isfinite's time. Finite weights that overflow it were not
    # trained.
    return math.isfinite(weight.sum(dtype=torch.float32).item())


def check_fits(adapter: Adapter, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raise AdapterIncompatible unless every layer names a Linear or Conv2d of its shape.

    modules: the pipeline's models by name, {"unet": pipe.unet, "text_encoder": pipe.text_encoder}.
    """
    known = {f"{model}.{name}": module for model, root in modules.items() for name, module in root.named_modules()}
    if misfits := [name for name, layer in adapter.layers.items() if not layer.fits(known.get(name))]:
        raise AdapterIncompatible(f"the adapter was made for another model; these layers do not fit: {listed(misfits)}")


def weight_shape(module: torch.nn.Linear | torch.nn.Conv2d) -> tuple[int, ...]:
    """Return the shape of the layer's weight, also where four bits of it are packed into a tensor of another shape."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _input_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the input shape of a weight: [in], and height and width of a kernel larger than one pixel."""
    return tuple(shape[1:2]) if math.prod(shape[2:]) == 1 else tuple(shape[1:])


def check_rank(adapter: Adapter, max_rank: int) -> None:
    """Raise `AdapterUnsupported` for a rank above the worker's limit."""
    rank = max(layer.rank for layer in adapter.layers.values())
    if rank > max_rank:
        raise AdapterUnsupported(f"the adapter is of rank {rank}; this worker takes ranks up to {max_rank}")
