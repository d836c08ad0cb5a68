"""Parse JSON that a worker wrote to a place where others can write: a value or a `ValueError`."""

import json
import math
from typing import Any, TypeGuard

MAX_INT64 = 2**63 - 1
# Workers write a few levels. Near Python's own limit a value might be parsed on one thread and fail to be written on
# another, which has less stack left.
MAX_DEPTH = 32


def strict_json(content: bytes) -> Any:
    """Parse UTF-8 JSON; raise `ValueError` for NaN, infinities, integers beyond 64 bits and deep nesting."""
    try:
        value = json.loads(content.decode(), parse_int=_int64, parse_float=_finite, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [one for one in level if isinstance(one, list | dict)]
        level = [inner for one in nested for inner in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, list | dict) for one in level):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether the value is a JSON number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _int64(digits: str) -> int:
    value = int(digits) if len(digits) <= len(str(MAX_INT64)) + 1 else MAX_INT64 + 1
    if abs(value) > MAX_INT64:
        raise ValueError(f"a whole number of {len(digits)} characters is beyond 64 bits")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits:.40} is beyond what a float holds")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
