"""Stage 3: SDXL, 1024x1024, 20 steps; the baselines draw three jobs for ten thirds of their time."""

from benchmarks.gpu.speed.speed import run_speed
from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    """Measure the model."""
    run_speed(context, "sdxl")
