"""Has one measurement that fails, between two that do not."""

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    context.measure("first", lambda: {"value": 1})
    context.measure("lost", _fail)
    context.measure("on a GPU alone", _fail, needs_cuda=True)
    context.measure("last", lambda: {"value": 3})


def _fail() -> Mapping[str, Any]:
    raise RuntimeError("no figure")
