"""Which arguments a library's function takes: diffusers' schedulers differ."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the function's parameters."""
    return frozenset(inspect.signature(function).parameters)
