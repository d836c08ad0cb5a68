"""Ends by an error that no measurement caught."""

from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    context.record("before it", value=float("inf"))
    raise ValueError("the stage is wrong")
