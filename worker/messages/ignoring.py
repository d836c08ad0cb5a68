"""Find the fields of a message that are not read: a misspelt one is otherwise missed only in the picture. Pure."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from worker.messages.schema import WireData

# At most so many are echoed: a message may hold thousands.
MAX_IGNORED = 20
# Fields that backends send beside those of `WireData`, for programs of their own.
UNUSED = frozenset({"generation_id", "style_id", "task_id", "type", "created_at", "webhook_url", "callback_url"})
NO_NAME = "?"

# Sent to the backend and logged: no control characters, no URLs, and no tokens, which mix letters and digits.
_NAME = re.compile(r"[\w-]{1,64}")
_TOKEN = re.compile(r"(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{16,}")


def ignored_in(fields: Mapping[str, Any], wire: WireData) -> tuple[str, ...]:
    """Return the names of the unknown fields in `data`, each once: "stlye", "signature_config.colour".

    A name of more than 64 characters, or one that looks like a token, is "?".
    """
    return tuple(dict.fromkeys(_unknown(fields, wire, "", UNUSED)))[:MAX_IGNORED]


def _unknown(fields: Mapping[str, Any], wire: BaseModel, place: str, unused: frozenset[str]) -> Iterator[str]:
    for name, value in fields.items():
        if value is None or name in unused:
            continue
        if name in type(wire).model_fields:
            yield from _unknown_within(value, getattr(wire, name), f"{place}{name}.")
        else:
            yield place + (name if _NAME.fullmatch(name) and not _TOKEN.search(name) else NO_NAME)


def _unknown_within(value: Any, known: Any, place: str) -> Iterator[str]:
    if isinstance(known, BaseModel):
        yield from _unknown(value, known, place, frozenset())
    elif isinstance(known, list):
        given = (item for item in value if item is not None)
        for item, wire in zip(given, known, strict=True):
            yield from _unknown_within(item, wire, place)
