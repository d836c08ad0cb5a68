"""Names of layers in the adapter files of each model family, mapped to those of the loaded pipeline."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from inference.lora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported, listed, shown
from inference.lora.names.flux_2_names import FLUX_2_FUSED, FLUX_2_ROOTS, FLUX_2_SWAPPED, FLUX_2_WORDS, flux_2_layer
from inference.lora.names.flux_names import (
    CHROMA_ROOTS,
    CHROMA_WORDS,
    FLUX_FUSED,
    FLUX_ROOTS,
    FLUX_SWAPPED,
    FLUX_WORDS,
    chroma_layer,
    flux_layer,
)
from inference.lora.names.krea2_names import KREA2_ROOTS, KREA2_WORDS, krea2_layer
from inference.lora.names.unet_names import UNET_ROOTS, UNET_WORDS, unet_layer

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
# The family's denoiser, in names that do not say which it is.
DENOISER = "denoiser"
# Every model that some family's files name, to distinguish models of another family from layers.
MODELS = frozenset({"unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"})
# First parts of a text encoder's layer names without the model's name.
TEXT_ENCODER_ROOTS = ("text_model.", "encoder.")

# Prefixes of PEFT, torch.compile, DDP and the pipelines of ComfyUI and DiffSynth before a layer's dotted name.
WRAPPERS = re.compile(r"(?:base_model\.model\.|_orig_mod\.|module\.)+")
DENOISER_PREFIX = re.compile(r"(?:model\.)?diffusion_model\.|pipe\.(?:dit|unet)\.")
# OneTrainer's OMI names begin with the encoder; ComfyUI's with the part of the checkpoint and the wrapper inside it.
ENCODER_PREFIX = re.compile(
    r"text_encoders\.(?P<part>\w+)\.(?:transformer\.)?|(?P<encoder>clip_l|clip_g|t5xxl|t5)\.(?:transformer\.)?"
)
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3", "t5": "text_encoder_3"}
# kohya's scripts make an underscore of every dot; VideoX-Fun's leave two, as the model itself has no name there.
UNDERSCORED = re.compile(
    r"(?:lora_(?P<model>unet|transformer|te|te1|te2|te3|prior_unet|prior_te)_{1,2}|lycoris_)(?P<layer>[\w-]+)", re.ASCII
)
UNDERSCORED_MODELS = {
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
    "prior_unet": "prior",
    "prior_te": "prior_text_encoder",
}
CLIP_WORDS = re.compile(r"text_model|self_attn|(?:[qkv]|out)_proj|text_projection|(?P<dot>_)")

Z_IMAGE_ROOTS = re.compile(
    "layers_|noise_refiner_|context_refiner_|(?:all_)?x_embedder|(?:all_)?final_layer_|t_embedder_|cap_embedder_"
)
# The underscores of Z-Image's own names.
Z_IMAGE_WORDS = re.compile(
    "noise_refiner|context_refiner|feed_forward|adaLN_modulation|adaln_modulation|to_[qkv]|to_out|(?:all_)?x_embedder"
    "|(?:all_)?final_layer|t_embedder|cap_embedder|(?P<dot>_)"
)
# From the names of the published code; "2-1" are the patch sizes of the only layers of their kind.
Z_IMAGE_RENAMES = (
    (re.compile(r"^final_layer\."), "all_final_layer.2-1."),
    (re.compile(r"^x_embedder$"), "all_x_embedder.2-1"),
    (re.compile(r"\.to(?:\.([qkv])|_(q|k|v|out)_lora)$"), r".to_\1\2"),
    (re.compile(r"\.to_out$"), ".to_out.0"),
    (re.compile(r"\.adaln_modulation\."), ".adaLN_modulation."),
)
OLD_ATTENTION = re.compile(r"\.to_(q|k|v|out)_lora$")


class Owned(NamedTuple):
    """A layer's model, and its dotted name within it."""

    model: str
    rest: str


@dataclass(frozen=True)
class KeyNaming:
    """The layers that adapters of one model family may change, and their names in files.

    models: those of the pipeline; names without a model belong to the first.
    roots, words: first parts of its layer names where dots are underscores, and words whose underscores are no dots.
    layer: maps model and dotted name to the pipeline's name of the layer.
    fused: endings of layers that replace several, with their up weights stacked in these shares, or that rename one.
    swapped: endings of layers whose up weights have their halves exchanged in files.
    unapplied: layers in files of this family that are not applied, by their description in a message.
    """

    models: tuple[str, ...]
    roots: re.Pattern[str]
    words: re.Pattern[str]
    layer: Callable[[str, str], str]
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    unapplied: Mapping[str, re.Pattern[str]] = field(default_factory=dict)

    def layer_names(self, stems: Collection[str]) -> dict[str, str]:
        """Map each stem in a file to the pipeline's name of its layer, "unet.down_blocks.0…to_q".

        A fused layer keeps its name (see `parts_of`), and is left out where the file also holds its parts. Raises
        AdapterIncompatible for names of another family, AdapterInvalid where two stems name one layer, or a fused
        layer is in part also apart.
        """
        names = {stem: self.layer_name(stem) for stem in stems}
        present = set(names.values())
        if len(present) < len(names):
            raise AdapterInvalid("the adapter holds two weights for the same place, by two names for one layer")
        parts = {name: present.intersection(self.parts_of(name)) - {name} for name in present}
        if partly := [name for name, held in parts.items() if held and len(held) < len(self.parts_of(name))]:
            raise AdapterInvalid(f"the adapter holds {listed(partly)} as one and in part also apart")
        return {stem: name for stem, name in names.items() if not parts[name]}

    def layer_name(self, stem: str) -> str:
        """Return the pipeline's name of the layer; errors as for `layer_names`."""
        model, rest = self.owner(stem)
        for what, pattern in self.unapplied.items():
            if pattern.fullmatch(f"{model}.{rest}"):
                raise AdapterUnsupported(f"the adapter holds {what}, and these are not applied: {shown(stem)}")
        if model not in self.models:
            raise AdapterIncompatible(
                f"the adapter was made for another model: {shown(stem)} is a layer of its {model}, and adapters of the "
                f"model here change its {', '.join(self.models)}"
            )
        layer = self.layer(model, rest.replace(".processor.", "."))
        if layer.endswith("_lora"):
            raise AdapterUnsupported(f"the adapter holds weights of an unknown kind: {shown(stem)}")
        return f"{model}.{layer}"

    def owner(self, name: str) -> Owned:
        """Return the model of a layer, and its dotted name within it."""
        if (underscored := UNDERSCORED.fullmatch(name)) is not None:
            model, layer = UNDERSCORED_MODELS.get(underscored["model"] or "", self.models[0]), underscored["layer"]
            if model != self.models[0]:
                return Owned(model, _dotted(layer, CLIP_WORDS))
            if not self.roots.match(layer):
                raise AdapterIncompatible(f"the adapter was made for another model, with layers such as {shown(name)}")
            return Owned(model, _dotted(layer, self.words))
        model, bare = "", WRAPPERS.sub("", name) if WRAPPERS.match(name) else name
        while (found := _without_prefix(bare)) is not None:
            model, bare = model or found.model, found.rest
        if not model and bare.startswith(TEXT_ENCODER_ROOTS):
            model = "text_encoder"
        return Owned(self.models[0] if model in ("", DENOISER) else model, bare)

    def parts_of(self, layer: str) -> dict[str, int]:
        """Return the layers of a fused name, else itself, and their shares of the rows of B; they have one A."""
        for ending, parts in self.fused.items():
            if layer.endswith(ending):
                return {layer.removesuffix(ending) + part: share for part, share in parts.items()}
        return {layer: 1}


def _without_prefix(name: str) -> Owned | None:
    """Split a model's prefix off a dotted name; None where there is none."""
    model, _, rest = name.partition(".")
    if model in MODELS and rest:
        return Owned(model, WRAPPERS.sub("", rest) if WRAPPERS.match(rest) else rest)
    if (found := DENOISER_PREFIX.match(name)) is not None:
        return Owned(DENOISER, name[found.end() :])
    if (found := ENCODER_PREFIX.match(name)) is not None:
        return Owned(ENCODERS.get(found["part"] or found["encoder"], "text_encoder"), name[found.end() :])
    return None


def _dotted(layer: str, words: re.Pattern[str]) -> str:
    return words.sub(lambda found: "." if found["dot"] else found[0], layer)


def _z_image_layer(_model: str, layer: str) -> str:
    for pattern, replacement in Z_IMAGE_RENAMES:
        layer = pattern.sub(replacement, layer)
    return layer


def _clip_layer(layer: str) -> str:
    # transformers 5 has no level "text_model" in a CLIPTextModel any more. Files have it or not.
    return OLD_ATTENTION.sub(r".\1_proj", layer.removeprefix("text_model."))


def _of_stable_diffusion(models: tuple[str, ...], layers_per_block: int) -> KeyNaming:
    def layer_of(model: str, layer: str) -> str:
        if model == "unet":
            return unet_layer(layer, layers_per_block)
        layer = _clip_layer(layer)
        # It is SDXL's second encoder, a CLIPTextModelWithProjection.
        return f"text_model.{layer}" if model == "text_encoder_2" and layer.startswith("encoder.") else layer

    return KeyNaming(models, UNET_ROOTS, UNET_WORDS, layer_of)


# Every published Stable Diffusion has two layers a block.
STABLE_DIFFUSION = _of_stable_diffusion(("unet", "text_encoder"), 2)

Z_IMAGE = KeyNaming(
    models=("transformer",),
    roots=Z_IMAGE_ROOTS,
    words=Z_IMAGE_WORDS,
    layer=_z_image_layer,
    fused={
        ".attention.qkv": {".attention.to_q": 1, ".attention.to_k": 1, ".attention.to_v": 1},
        ".attention.out": {".attention.to_out.0": 1},
    },
    unapplied={
        "layers of the text encoder": re.compile(r"text_encoder\.(?:model\.)?layers\..*", re.DOTALL),
        "w1 and w3 in one, in an order that it does not tell": re.compile(r".*\.feed_forward\.w13", re.DOTALL),
    },
)

FLUX = KeyNaming(
    models=("transformer", "text_encoder"),
    roots=FLUX_ROOTS,
    words=FLUX_WORDS,
    layer=lambda model, layer: flux_layer(layer) if model == "transformer" else _clip_layer(layer),
    fused=FLUX_FUSED,
    swapped=FLUX_SWAPPED,
    unapplied={"layers of T5": re.compile(r"text_encoder_[23]\.encoder\.block\..*", re.DOTALL)},
)

# It has no modulations of its own to train, and no CLIP.
CHROMA = replace(
    FLUX,
    models=("transformer",),
    roots=CHROMA_ROOTS,
    words=CHROMA_WORDS,
    layer=lambda _model, layer: chroma_layer(layer),
    unapplied={"layers of T5": re.compile(r"text_encoder(?:_[23])?\.encoder\.block\..*", re.DOTALL)},
)

QWEN_IMAGE = KeyNaming(
    models=("transformer",),
    roots=re.compile("transformer_blocks_|(?:img|txt)_in|time_text_embed_|norm_out_|proj_out"),
    words=re.compile(
        "transformer_blocks|(?:img|txt)_(?:mod|mlp|in)|to_[qkv]|to_out|to_add_out|add_[qkv]_proj|time_text_embed"
        "|timestep_embedder|linear_[12]|norm_out|proj_out|(?P<dot>_)"
    ),
    layer=lambda _model, layer: layer,
    unapplied={"layers of the text encoder": re.compile(r"text_encoder\.(?:model\.)?.*layers\..*", re.DOTALL)},
)

FLUX_2 = KeyNaming(
    models=("transformer",),
    roots=FLUX_2_ROOTS,
    words=FLUX_2_WORDS,
    layer=lambda _model, layer: flux_2_layer(layer),
    fused=FLUX_2_FUSED,
    swapped=FLUX_2_SWAPPED,
)

KREA2 = KeyNaming(
    models=("transformer",),
    roots=KREA2_ROOTS,
    words=KREA2_WORDS,
    layer=lambda _model, layer: krea2_layer(layer),
    unapplied={
        "layers of the text encoder": re.compile(r"text_encoder\.(?:(?:model|language_model)\.)*layers\..*", re.DOTALL)
    },
)


def sdxl(layers_per_block: int) -> KeyNaming:
    """Return the naming of an SDXL whose UNet has that many layers a block."""
    return _of_stable_diffusion(("unet", "text_encoder", "text_encoder_2"), layers_per_block)
