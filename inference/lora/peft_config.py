"""Read PEFT's LoraConfig: the scale it gives to each layer.

Nothing here is matched as a regular expression because a file says so.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.lora.errors import AdapterInvalid, AdapterUnsupported, listed
from inference.lora.files import parse_object

# A target_modules list that names every layer of SDXL has about 45 kB.
MAX_CONFIG_BYTES = 64_000
# Adapters of rank 256 are published; beyond 512 the model itself would be.
MAX_RANK = 512
# PEFT's alphas are small multiples of the rank; the bound only keeps the folded weights from overflowing.
MAX_ALPHA = 1e6
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
        """Return the factor of B·A for `layer`, a dotted name; AdapterInvalid unless its rank is as stated."""
        stated = _first_match(self.rank_pattern, layer, default=self.rank)
        if stated != rank:
            raise AdapterInvalid(f"{layer} is of rank {rank}, but the adapter's settings say {stated:g}")
        alpha = _first_match(self.alpha_pattern, layer, default=self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _first_match(pattern: Mapping[str, tuple[int, float]], layer: str, *, default: float) -> float:
    """Return the value that PEFT finds first by `re.match(rf"(.*\\.)?({name})$", layer)`, by its suffixes."""
    parts = layer.split(".")
    suffixes = [".".join(parts[start:]) for start in range(len(parts))]
    # An anchored name means the whole layer, which a file may write with or without the model's own name in front.
    candidates = [*suffixes, *(f"^{name}" for name in suffixes[:2])]
    return min((pattern[name] for name in candidates if name in pattern), default=(0, default))[1]


def read_peft_config(path: Path) -> Scaling:
    """Read the scaling from a PEFT folder's adapter_config.json; errors as for `parse_scaling`."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterInvalid(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes")
    settings = parse_object(path.read_bytes(), "adapter_config.json")
    if "peft_type" not in settings:
        raise AdapterInvalid("adapter_config.json does not say what kind of adapter it is")
    return parse_scaling(settings)


def parse_scaling(settings: Mapping[str, Any]) -> Scaling:
    """Parse the scaling in a LoraConfig written as JSON.

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
    """Return `value` as an alpha; AdapterInvalid unless it is a finite number up to `MAX_ALPHA`."""
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise AdapterInvalid(f"the adapter states an alpha that is not a number up to {MAX_ALPHA:g}")
    return float(value)
