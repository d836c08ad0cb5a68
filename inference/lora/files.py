"""The untrusted half of an adapter: a weight file's bytes to tensors, an adapter's settings to numbers.

Nothing here is ever unpickled, imported or matched as a regular expression because a file says so.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors
import safetensors.torch
import torch

# A rank-256 SDXL adapter with convolutions is about 900 MB; anything larger is a checkpoint, not an adapter.
MAX_FILE_BYTES = 1_000_000_000
# safetensors itself accepts 100 MB of JSON, which takes seconds and gigabytes to parse. 4000 tensors need about 600 kB,
# and training scripts write the tags of all their pictures beside them.
MAX_HEADER_BYTES = 4_000_000
# An SDXL adapter over every layer of the UNet and both text encoders, with alphas, has about 3200.
MAX_TENSORS = 4000
# The longest real name (SDXL, PEFT prefix and all) has about 130 characters. The hyphen is Z-Image's: x_embedder.2-1.
LAYER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")
# What adapters are trained in, and what tools save them in: 8-bit floats are exact in 32 bits, 64-bit ones are rounded
# to what the model computes in. Integers would need a scale that safetensors has no place for.
WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# diffusers' own kohya export writes its alphas as 64-bit integers, other tools in the smallest that holds them.
ALPHA_DTYPES = WEIGHT_DTYPES | {"I64", "I32", "I16", "I8", "U8"}
# A target_modules list that names every layer of SDXL has about 45 kB.
MAX_CONFIG_BYTES = 64_000
# Adapters of rank 256 are published; beyond 512 one would rather publish the model.
MAX_RANK = 512
# PEFT's alphas are small multiples of the rank; the bound only keeps the folded weights from overflowing.
MAX_ALPHA = 1e6

HEADER_LENGTH_BYTES = 8
BEGINNING_BYTES = 256  # enough to tell what kind of file it is
METADATA = "__metadata__"
# A zip (torch.save today), a pickle of protocol 2 or later (torch.save once), a pickle of protocol 0 calling something.
PICKLE_OR_ZIP = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]|\(?c[\w.]+\n")
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})

# PEFT takes the names of rank_pattern and alpha_pattern as regular expressions. Written by training scripts they are
# plain module names, at most anchored, and only those are read.
LITERAL_PATTERN = re.compile(r"\^?[A-Za-z0-9_.-]{1,256}")
# What PEFT assumes where the file is silent.
PEFT_DEFAULT_RANK = PEFT_DEFAULT_ALPHA = 8
# Settings of training, or of finding the layers that the tensors' names tell anyway. Whatever they hold, they do not
# change what the adapter computes. Every other setting that we do not read must be off.
HARMLESS_SETTINGS = frozenset(
    """auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    peft_version qalora_group_size revision target_modules task_type""".split()  # noqa: SIM905
)
READ_SETTINGS = frozenset(
    "alpha_pattern bias init_lora_weights lora_alpha peft_type r rank_pattern use_rslora".split()  # noqa: SIM905
)
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, …) also change the base weights when PEFT loads the adapter.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterError(Exception):
    """An adapter that cannot be used; the message is one sentence fit for the job's owner."""

    code: ClassVar[str]


class AdapterInvalid(AdapterError):
    """The file or its settings are damaged, contradictory or beyond the limits."""

    code = "LORA_INVALID"


class AdapterUnsafe(AdapterError):
    """The file is a pickle or an archive of pickles: opening it could run code."""

    code = "LORA_UNSAFE_FORMAT"


class AdapterUnsupported(AdapterError):
    """The adapter is not plain low rank (DoRA, LoHa, LoKr, …), or holds something that would be left out."""

    code = "LORA_UNSUPPORTED"


class AdapterIncompatible(AdapterError):
    """The adapter was made for another base model."""

    code = "LORA_INCOMPATIBLE"


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file whose header was read, and nothing of it judged but its size.

    entries: what the header says of each tensor, by its name, which may be any text.
    """

    entries: Mapping[str, Any]
    metadata: Mapping[str, str]
    content: bytes

    def load(self, stems: Iterable[str]) -> dict[str, torch.Tensor]:
        """Load the tensors on the CPU. `stems` are the layers' names within those of the tensors.

        Raises AdapterInvalid for anything damaged, absurd or of a foreign dtype.
        """
        if len(self.entries) > MAX_TENSORS:
            raise AdapterInvalid(f"the adapter file holds {len(self.entries)} tensors, more than {MAX_TENSORS}")
        for stem in stems:
            if not LAYER_NAME.fullmatch(stem):
                raise AdapterInvalid(f"the adapter file holds a layer with an odd name: {shown(stem)}")
        for name, entry in self.entries.items():
            _check_entry(name, entry)
        try:
            return safetensors.torch.load(self.content)
        except safetensors.SafetensorError as error:
            # It quotes what it met, which may be all of the header.
            raise AdapterInvalid(f"the adapter file is damaged: {str(error)!a:.200}") from error


def shown(name: str) -> str:
    """Return `name` for a message: a file's names may be any text of any length."""
    return name if LAYER_NAME.fullmatch(name) else ascii(name[:64])


def listed(names: Iterable[str]) -> str:
    """The first few names and how many there are, for a message."""
    ordered = sorted(names)
    return f"{', '.join(map(shown, ordered[:3]))}{', …' if len(ordered) > 3 else ''} ({len(ordered)} in all)"


def open_weights(path: Path) -> WeightFile:
    """Read a safetensors file, which is no longer needed then.

    Raises AdapterUnsafe for a pickle or zip, AdapterInvalid where it is too large or has no proper header.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise AdapterInvalid(f"the adapter file is larger than {MAX_FILE_BYTES} bytes")

    with path.open("rb") as file:
        _header_length(file.read(BEGINNING_BYTES), path.suffix)  # before half a gigabyte is read for nothing
        file.seek(0)
        # All of it once, so that the bytes that are checked are the bytes that are used.
        content = file.read()
    length = _header_length(content, path.suffix)
    header = parse_object(content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length], "the adapter file's header")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterInvalid("the adapter file's metadata are not text")
    return WeightFile(header, metadata, content)


def _header_length(content: bytes, suffix: str) -> int:
    """What a safetensors file, or its beginning, says of its header: bytes, within the limit."""
    length = int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    is_safetensors = length <= MAX_HEADER_BYTES and content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + 1] == b"{"
    if not is_safetensors and (suffix in PICKLE_SUFFIXES or PICKLE_OR_ZIP.match(content)):
        raise AdapterUnsafe("the adapter file is a pickle or an archive: only safetensors files are opened")
    if not is_safetensors:
        raise AdapterInvalid("the adapter file does not begin with a safetensors header of an acceptable size")
    return length


def _check_entry(name: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise AdapterInvalid(f"the adapter file's header has no proper entry for {shown(name)}")
    dtypes = ALPHA_DTYPES if name.endswith(".alpha") else WEIGHT_DTYPES
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in dtypes:
        known = ", ".join(sorted(dtypes))
        raise AdapterInvalid(f"the adapter's {shown(name)} is of type {dtype!a:.20}, not one of {known}")


def parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object without repeated names, NaN or absurd nesting; `what` names it in the AdapterInvalid else."""
    try:
        parsed = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{what} is not proper JSON") from error
    if not isinstance(parsed, dict):
        raise AdapterInvalid(f"{what} is not a JSON object")
    return parsed


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # safetensors accepts a repeated name and keeps the last: two readers could see two different adapters.
    if len(parsed := dict(pairs)) < len(pairs):
        raise ValueError("repeated name")
    return parsed


def _no_constant(name: str) -> float:
    raise ValueError(name)


@dataclass(frozen=True)
class Scaling:
    """How strongly PEFT applies each layer of one model: alpha over rank, or over its root for rank-stabilised LoRA.

    The patterns map a literal module name to its place in the file and its value: PEFT takes the first that matches.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, tuple[int, float]]
    alpha_pattern: Mapping[str, tuple[int, float]]
    is_rank_stabilised: bool

    def of(self, layer: str, *, rank: int) -> float:
        """The factor of B·A for `layer` (its dotted name); AdapterInvalid unless its tensors have the rank stated."""
        stated = _first_match(self.rank_pattern, layer, default=self.rank)
        if stated != rank:
            raise AdapterInvalid(f"{layer} is of rank {rank}, but the adapter's settings say {stated:g}")
        alpha = _first_match(self.alpha_pattern, layer, default=self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _first_match(pattern: Mapping[str, tuple[int, float]], layer: str, *, default: float) -> float:
    """The value PEFT's `re.match(rf"(.*\\.)?({name})$", layer)` finds first, by look-ups of the layer's suffixes."""
    parts = layer.split(".")
    suffixes = [".".join(parts[start:]) for start in range(len(parts))]
    # An anchored name means the whole layer, which a file may write with or without the model's own name in front.
    candidates = [*suffixes, *(f"^{name}" for name in suffixes[:2])]
    return min((pattern[name] for name in candidates if name in pattern), default=(0, default))[1]


def read_peft_config(path: Path) -> Scaling:
    """The scaling that a PEFT folder's adapter_config.json states; errors as for `parse_scaling`."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterInvalid(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes")
    settings = parse_object(path.read_bytes(), "adapter_config.json")
    if "peft_type" not in settings:
        raise AdapterInvalid("adapter_config.json does not say what kind of adapter it is")
    return parse_scaling(settings)


def parse_scaling(settings: Mapping[str, Any]) -> Scaling:
    """The scaling in a LoraConfig written as JSON.

    Raises AdapterUnsupported for anything but plain LoRA, AdapterInvalid for values of a wrong kind or size.
    """
    _refuse_other_methods(settings)
    is_rank_stabilised = settings.get("use_rslora", False)
    if not isinstance(is_rank_stabilised, bool):
        raise AdapterInvalid("the adapter's use_rslora is not true or false")
    return Scaling(
        rank=_rank(settings.get("r", PEFT_DEFAULT_RANK)),
        alpha=checked_alpha(settings.get("lora_alpha", PEFT_DEFAULT_ALPHA)),
        rank_pattern={name: (i, _rank(value)) for i, (name, value) in enumerate(_pattern(settings, "rank_pattern"))},
        alpha_pattern={
            name: (i, checked_alpha(value)) for i, (name, value) in enumerate(_pattern(settings, "alpha_pattern"))
        },
        is_rank_stabilised=is_rank_stabilised,
    )


def _refuse_other_methods(settings: Mapping[str, Any]) -> None:
    unread = settings.keys() - HARMLESS_SETTINGS - READ_SETTINGS
    if settings.get("peft_type", "LORA") != "LORA":
        raise AdapterUnsupported(f"the adapter is of type {settings['peft_type']!a:.40}, not LORA")
    if settings.get("bias", "none") != "none":
        raise AdapterUnsupported("the adapter also changes biases")
    if settings.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise AdapterUnsupported("the adapter's initialisation changes the base model's weights")
    if is_on := [ascii(name[:64]) for name in unread if settings[name]]:
        raise AdapterUnsupported(f"the adapter uses settings that are not plain LoRA: {listed(is_on)}")


def _pattern(settings: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    pattern = settings.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterInvalid(f"the adapter's {name} is not a JSON object")
    if odd := [ascii(key[:64]) for key in pattern if not LITERAL_PATTERN.fullmatch(key)]:
        raise AdapterInvalid(f"the adapter's {name} holds what is not a module's name: {listed(odd)}")
    return pattern.items()


def _rank(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterInvalid(f"the adapter states a rank that is not a whole number from 1 to {MAX_RANK}")
    return value


def checked_alpha(value: Any) -> float:
    """`value` as an alpha; AdapterInvalid unless it is a finite number of a sane size."""
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise AdapterInvalid(f"the adapter states an alpha that is not a number up to {MAX_ALPHA:g}")
    return float(value)
