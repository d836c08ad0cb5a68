"""Stage shortage."""

from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    """Measure nothing yet."""
    context.record("nothing", skipped="not written yet")
