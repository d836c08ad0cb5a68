"""The names that adapter files of each model family have for the layers they change.

A layer is known in its file by its stem: what the names of its two weights and of its alpha have in common.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType

from inference.adapter_files import AdapterIncompatible, AdapterInvalid, AdapterUnsupported, listed

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
# Every model that some family's files name, so that those of another family are told from layers.
MODELS = frozenset({"unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"})
# How a text encoder's layers begin where a file does not say whose they are.
TEXT_ENCODER_ROOTS = ("text_model.", "encoder.")

# In the oldest diffusers files the layer's own name ends in _lora, and stays so in the stem. ".default" is the name of
# PEFT's adapter, which some scripts forget to take out.
WEIGHT = re.compile(
    r"(?P<stem>.+?)(?:\.lora_(?:linear_layer\.)?|\.lora\.|(?<=_lora)\.)(?P<half>A|B|down|up)(?:\.default)?\.weight"
)
KOHYA = re.compile(r"lora_(?:unet|te|te1|te2|te3)_[\w-]+")
KOHYA_TEXT_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
# ComfyUI's names are kohya's with the dots left in.
COMFY_PREFIX, KOHYA_PREFIX = "diffusion_model.", "lora_unet_"

SD_ROOTS = "down_blocks_|mid_block_|up_blocks_|conv_in|conv_out|time_embedding_"
# SDXL's layers are also named as in the code it was published with ("SGM"). The numbers of its blocks have one digit:
# diffusers' converter mixes up longer ones, and would take seconds for thousands of blocks.
SGM_ROOTS = (
    "add_embedding_|time_embed_|label_emb_|out_2|input_blocks_0_0"
    r"|(?:input|output)_blocks_\d_[0-2]_|middle_block_[0-2]_"
)
Z_IMAGE_ROOTS = (
    "layers_|noise_refiner_|context_refiner_|(?:all_)?x_embedder|(?:all_)?final_layer_|t_embedder_|cap_embedder_"
)
# The underscores of Z-Image's own names; kohya's scripts make one of every dot too.
Z_IMAGE_WORDS = re.compile(
    "noise_refiner|context_refiner|feed_forward|adaLN_modulation|to_[qkv]|to_out|(?:all_)?x_embedder"
    "|(?:all_)?final_layer|t_embedder|cap_embedder|(?P<dot>_)"
)
# diffusers' converter gives both of these the same name, but tells them apart by their SGM names.
MISCONVERTED = {
    "lora_unet_add_embedding_linear_1": "lora_unet_label_emb_0_0",
    "lora_unet_add_embedding_linear_2": "lora_unet_label_emb_0_2",
}

Rename = tuple[re.Pattern[str], str]
# transformers 5 has no level "text_model" in a CLIPTextModel any more, but still has it in SDXL's second encoder, a
# CLIPTextModelWithProjection. Files have it or not.
CLIP_RENAMES: dict[str, tuple[Rename, ...]] = {
    "text_encoder": ((re.compile(r"^text_model\."), ""),),
    "text_encoder_2": ((re.compile(r"^(?=encoder\.)"), "text_model."),),
}
# From the names of the published code; "2-1" are the patch sizes of the only layers of their kind.
Z_IMAGE_RENAMES: dict[str, tuple[Rename, ...]] = {
    "transformer": (
        (re.compile(r"^final_layer\."), "all_final_layer.2-1."),
        (re.compile(r"^x_embedder$"), "all_x_embedder.2-1"),
        (re.compile(r"\.to\.([qkv])$"), r".to_\1"),
    )
}


class StemAndHalf(NamedTuple):
    stem: str
    is_up: bool


class Owned(NamedTuple):
    model: str
    rest: str


@dataclass(frozen=True)
class Dialect:
    """What the adapters of one model family may change, and what their files call it.

    models: those of the pipeline, first the one that names without a model belong to.
    kohya_roots: how that one's layers begin in kohya's names.
    undo_kohya: kohya's stems to dotted ones with a model in front; what it leaves out was named twice.
    renames: what is left to change in a layer's name within its model.
    fused: names of layers that stand for several, whose up weights lie on top of each other, or for one.
    """

    models: tuple[str, ...]
    kohya_roots: re.Pattern[str]
    undo_kohya: Callable[[Collection[str]], dict[str, str]]
    renames: Mapping[str, tuple[Rename, ...]]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def layer_names(self, stems: Collection[str]) -> dict[str, str]:
        """What the loaded pipeline calls each layer, "unet.down_blocks.0…to_q", by the layer's stem in the file.

        A fused layer keeps its name (see `parts_of`), and is left out where the file also holds its parts. Raises
        AdapterIncompatible for names of another family's, AdapterInvalid where two stems mean one layer.
        """
        kohya = {stem: name for stem in stems if (name := _kohya_name(stem)) is not None}
        self._check_kohya(kohya)
        dotted = self.undo_kohya(set(kohya.values()))
        if twice := [stem for stem, name in kohya.items() if name not in dotted]:
            raise AdapterInvalid(f"the adapter names its layers in two ways, or one of them twice: {listed(twice)}")

        names = {stem: self._layer_name(dotted[kohya[stem]] if stem in kohya else stem) for stem in stems}
        if len(set(names.values())) < len(names):
            raise AdapterInvalid("the adapter holds two weights for the same place")
        return self._without_copies(names)

    def owner(self, name: str) -> Owned:
        """The model that a dotted name belongs to, and the name within it."""
        bare = name.removeprefix(PEFT_PREFIX)
        model, _, rest = bare.partition(".")
        if model in MODELS:
            return Owned(model, rest)
        return Owned("text_encoder" if bare.startswith(TEXT_ENCODER_ROOTS) else self.models[0], bare)

    def parts_of(self, layer: str) -> tuple[str, ...]:
        """The layers that a name stands for: itself, unless it is fused. They share A; B is theirs in this order."""
        for ending, parts in self.fused.items():
            if layer.endswith(ending):
                return tuple(layer.removesuffix(ending) + part for part in parts)
        return (layer,)

    def _check_kohya(self, kohya: Mapping[str, str]) -> None:
        """Before diffusers' converter gets them, which makes one name of several that are not its own."""
        strange: list[str] = []
        for stem, name in kohya.items():
            model, _, layer = name.removeprefix("lora_").partition("_")
            self._check_model(KOHYA_TEXT_ENCODERS.get(model, self.models[0]), stem)
            if model == "unet" and not self.kohya_roots.match(layer):
                strange.append(stem)
        if strange:
            raise AdapterIncompatible(f"the adapter was made for another model, with layers such as {listed(strange)}")

    def _check_model(self, model: str, stem: str) -> None:
        if model not in self.models:
            raise AdapterIncompatible(
                f"the adapter was made for another model: {stem} is a layer of its {model}, and adapters of the model "
                f"here change its {', '.join(self.models)}"
            )

    def _layer_name(self, dotted: str) -> str:
        model, rest = self.owner(dotted)
        self._check_model(model, dotted)
        down = f"{rest}.down.weight" if rest.endswith("_lora") else rest + DOWN
        convert = _text_encoder_names if model.startswith("text_encoder") else convert_unet_state_dict_to_peft
        (converted,) = convert({down: dotted})
        if not converted.endswith(DOWN):
            raise AdapterUnsupported(f"the adapter holds weights of an unknown kind: {dotted}")
        layer = converted.removesuffix(DOWN)
        for pattern, replacement in self.renames.get(model, ()):
            layer = pattern.sub(replacement, layer)
        return f"{model}.{layer}"

    def _without_copies(self, names: Mapping[str, str]) -> dict[str, str]:
        present = set(names.values())
        parts = {name: present.intersection(self.parts_of(name)) - {name} for name in present}
        if partly := [name for name, held in parts.items() if held and len(held) < len(self.parts_of(name))]:
            raise AdapterInvalid(f"the adapter holds {listed(partly)} as one and in part also apart")
        return {stem: name for stem, name in names.items() if not parts[name]}


def stem_and_half(name: str) -> StemAndHalf | None:
    """The layer's stem and the half of a weight's name in a file; None where it is no low-rank weight's."""
    match = WEIGHT.fullmatch(name)
    return match and StemAndHalf(match["stem"], is_up=match["half"] in ("B", "up"))


def _kohya_name(stem: str) -> str | None:
    if stem.startswith(COMFY_PREFIX):
        stem = KOHYA_PREFIX + stem.removeprefix(COMFY_PREFIX).replace(".", "_")
    return stem if KOHYA.fullmatch(stem) else None


def _text_encoder_names(state: dict[str, str]) -> dict[str, str]:
    # Stating the type, because the converter's guess fails for adapters without an attention output. This one also
    # covers the newer names.
    return dict(convert_state_dict_to_peft(state, original_type=StateDictType.DIFFUSERS_OLD))


def _undo_kohya_of_a_unet(stems: Collection[str], *, unet_config: Any = None) -> dict[str, str]:
    """By diffusers' converter, which only moves the values of a state dict to other names: it gets stems for values.

    unet_config: by its layers_per_block the SGM names of blocks are told apart; None leaves them as they are.
    """
    if not stems:
        return {}
    halves = ("lora_down", "lora_up")
    state = {f"{MISCONVERTED.get(stem, stem)}.{half}.weight": stem for stem in stems for half in halves}
    try:
        converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=unet_config)
    except (IndexError, KeyError, ValueError) as error:
        raise AdapterIncompatible("the adapter was made for another model, of other blocks") from error
    return {stem: found.stem for name, stem in converted.items() if (found := stem_and_half(name))}


def _undo_kohya_of_z_image(stems: Collection[str]) -> dict[str, str]:
    layers = {stem: stem.removeprefix(KOHYA_PREFIX) for stem in stems}
    return {
        stem: "transformer." + Z_IMAGE_WORDS.sub(lambda found: "." if found["dot"] else found[0], layer)
        for stem, layer in layers.items()
    }


STABLE_DIFFUSION = Dialect(
    models=("unet", "text_encoder"),
    kohya_roots=re.compile(SD_ROOTS),
    undo_kohya=_undo_kohya_of_a_unet,
    renames=CLIP_RENAMES,
)

Z_IMAGE = Dialect(
    models=("transformer",),
    kohya_roots=re.compile(Z_IMAGE_ROOTS),
    undo_kohya=_undo_kohya_of_z_image,
    renames=Z_IMAGE_RENAMES,
    fused={
        ".attention.qkv": (".attention.to_q", ".attention.to_k", ".attention.to_v"),
        ".attention.out": (".attention.to_out.0",),
    },
)


def sdxl(unet_config: Any) -> Dialect:
    """SDXL's dialect; `unet_config` is `pipe.unet.config`, whose layers_per_block is read."""
    return Dialect(
        models=("unet", "text_encoder", "text_encoder_2"),
        kohya_roots=re.compile(f"{SD_ROOTS}|{SGM_ROOTS}"),
        undo_kohya=partial(_undo_kohya_of_a_unet, unet_config=unet_config),
        renames=CLIP_RENAMES,
    )
