"""The stages, in the order of what blocks what: correctness before speed, a small model before a large one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """`seconds`: its time box. `measures_speed`: of no use where nothing is right. `needs_engine`: more than torch."""

    number: int
    name: str
    seconds: float
    module: str
    measures_speed: bool = False
    needs_engine: bool = True


# The last one's box is what the budget leaves.
STAGES = (
    Stage(0, "ceilings", 35, "benchmarks.gpu.ceilings.ceilings", needs_engine=False),
    Stage(1, "correctness", 60, "benchmarks.gpu.correctness"),
    Stage(2, "sd15", 95, "benchmarks.gpu.speed.sd15", measures_speed=True),
    Stage(3, "sdxl", 100, "benchmarks.gpu.speed.sdxl", measures_speed=True),
    Stage(4, "z-image", 80, "benchmarks.gpu.speed.z_image", measures_speed=True),
    Stage(5, "shortage", 35, "benchmarks.gpu.shortage.shortage"),
    Stage(6, "toggles", float("inf"), "benchmarks.gpu.speed.toggles", measures_speed=True),
)
NUMBERS = tuple(stage.number for stage in STAGES)
