"""Stage 0: what this machine can do at most, by torch alone, so that what the engine does can be held against it."""

from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    """Measure every ceiling."""
    context.measure("threads", lambda: {"threads": 1})
