"""Stage 2: Stable Diffusion 1.5, 512x512, 20 steps."""

from benchmarks.gpu.speed.speed import run_speed
from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    """Measure the model."""
    run_speed(context, "sd15")
