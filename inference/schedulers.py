"""The diffusers schedulers a job may name."""

from collections.abc import Callable
from typing import Any

import diffusers

from inference.request import RequestFailed

DEFAULT_SCHEDULER = "dpm++"

_Make = Callable[[Any], Any]

SCHEDULERS: dict[str, _Make] = {
    "dpm++": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++"),
    "dpm++_karras": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", use_karras_sigmas=True
    ),
    "euler": diffusers.EulerDiscreteScheduler.from_config,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler.from_config,
    "ddim": diffusers.DDIMScheduler.from_config,
    "unipc": diffusers.UniPCMultistepScheduler.from_config,
}


def make_scheduler(name: str | None, config: Any) -> tuple[str, Any]:
    """A fresh scheduler by `name` (None: the default) from the checkpoint's own scheduler config, and its name.

    Fresh each time: a diffusers scheduler keeps a hidden step index and must never be shared.
    """
    name = name or DEFAULT_SCHEDULER
    if name not in SCHEDULERS:
        raise RequestFailed("INVALID_INPUT", f"scheduler {name!r} is not known; known are {', '.join(SCHEDULERS)}")
    return name, SCHEDULERS[name](config)
