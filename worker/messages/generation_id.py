"""The id of a generation, as its backend writes it: a number or text, echoed unchanged."""

import re
from typing import Any, TypeGuard

GenerationId = int | str

MAX_NUMBER = 2**63 - 1
TEXT = r"[A-Za-z0-9._-]{1,128}"
ID_RULE = "a whole number from 1 to 2^63-1, or text of 1 to 128 letters, digits, dots, underscores and dashes"

_TEXT = re.compile(TEXT)
_UUID = r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}"
# Ids that stay unambiguous with -2 appended.
_PLAIN = re.compile(rf"[0-9]+|{_UUID}")
_PLAIN_AND_NUMBER = re.compile(rf"(?:[0-9]+|{_UUID})-[0-9]+")


def is_generation_id(given: Any) -> TypeGuard[GenerationId]:
    """Return True where `given`, a JSON value, is a valid id, as `ID_RULE` describes."""
    if isinstance(given, str):
        return _TEXT.fullmatch(given) is not None
    # Not isinstance: True is an int.
    return type(given) is int and 1 <= given <= MAX_NUMBER


def is_same(one: GenerationId | None, other: GenerationId | None) -> bool:
    """Return True where both name one generation. 456 and "456" do: they are stored under one key."""
    return one is not None and other is not None and str(one) == str(other)


def image_key(generation_id: GenerationId, number: int = 1) -> str:
    """Return the key of a generation's picture; `number` counts its pictures from 1.

    Behind a number or a UUID the others end in -2, -3 …; behind other text in ~2, ~3 …, for "a-2" may be another
    generation. Text that reads like a number or UUID with -2 behind it has ~1. No two generations share a key.
    """
    text = str(generation_id)
    if number > 1:
        suffix = f"-{number}" if _PLAIN.fullmatch(text) else f"~{number}"
    else:
        suffix = "~1" if _PLAIN_AND_NUMBER.fullmatch(text) else ""
    return f"generations/gen-{text}{suffix}.png"
