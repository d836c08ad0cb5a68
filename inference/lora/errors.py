"""Errors of adapters, and how their messages quote the names in a file."""

import re
from collections.abc import Iterable
from typing import ClassVar

# The longest real name (SDXL, PEFT prefix and all) has about 130 characters. The hyphen is Z-Image's: x_embedder.2-1.
LAYER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")


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


def shown(name: str) -> str:
    """Return `name` quoted for a message: a file's names may be any text of any length."""
    return name if LAYER_NAME.fullmatch(name) else ascii(name[:64])


def listed(names: Iterable[str]) -> str:
    """Return the first three names and their number, for a message."""
    ordered = sorted(names)
    return f"{', '.join(map(shown, ordered[:3]))}{', …' if len(ordered) > 3 else ''} ({len(ordered)} in all)"
