"""The diffusers schedulers a job may name, by what the model predicts: noise, or the flow from noise to picture."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import diffusers
import numpy as np

from config.redacting import quoted
from inference.errors import RequestFailed


@dataclass(frozen=True)
class SchedulerTable:
    """Schedulers by name. `makers` build one from the checkpoint's own scheduler config."""

    default: str
    makers: Mapping[str, Callable[[Any], Any]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.makers)

    def make(self, name: str | None, config: Any) -> tuple[str, Any]:
        """A fresh scheduler by `name` (None: the default), and its name.

        Fresh each time: a diffusers scheduler keeps a hidden step index and must never be shared.
        """
        self.check(name)
        name = name or self.default
        return name, self.makers[name](config)

    def check(self, name: str | None) -> None:
        """Raise `RequestFailed` where there is none by `name`."""
        if name and name not in self.makers:
            known = ", ".join(self.makers)
            raise RequestFailed("INVALID_INPUT", f"scheduler {quoted(name)} is not known; known are {known}")


DIFFUSION = SchedulerTable(
    default="dpm++",
    makers={
        "dpm++": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++"),
        "dpm++_karras": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", use_karras_sigmas=True
        ),
        "euler": diffusers.EulerDiscreteScheduler.from_config,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler.from_config,
        "ddim": diffusers.DDIMScheduler.from_config,
        "unipc": diffusers.UniPCMultistepScheduler.from_config,
        "heun": diffusers.HeunDiscreteScheduler.from_config,
        "lcm": diffusers.LCMScheduler.from_config,
    },
)
# What its checkpoints are published with, turbo and lightning ones included.
SDXL = replace(DIFFUSION, default="euler")


def _flow_solver(solver: Any) -> Callable[[Any], Any]:
    """A solver written for diffusion, set to a flow with the checkpoint's shift."""

    def make(config: Any) -> Any:
        return solver.from_config(
            config,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.get("shift", 1.0),
        )

    return make


FLOW = SchedulerTable(
    default="euler",
    makers={
        "euler": diffusers.FlowMatchEulerDiscreteScheduler.from_config,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler.from_config,
        "dpm++": _flow_solver(diffusers.DPMSolverMultistepScheduler),
        "unipc": _flow_solver(diffusers.UniPCMultistepScheduler),
        "lcm": diffusers.FlowMatchLCMScheduler.from_config,
    },
)


def set_timesteps(scheduler: Any, num_steps: int, shift: float | None = None) -> None:
    """Have `scheduler` begin a course of `num_steps`. `shift` is a flow's `mu` where it depends on the picture's size.

    A flow's noise levels are given as `ZImagePipeline` gives them, from 1 down to 1 / num_steps, where a scheduler
    takes them: its own guess would end elsewhere.
    """
    takes = parameters_of(type(scheduler).set_timesteps)
    given: dict[str, Any] = {}
    if "sigmas" in takes and _is_flow(scheduler):
        # An array: UniPC multiplies what it is given.
        given["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    if "mu" in takes and shift is not None:
        given["mu"] = shift
    try:
        scheduler.set_timesteps(num_steps, **given)
    except ValueError as error:
        raise RequestFailed("INVALID_INPUT", f"the scheduler cannot take {num_steps} steps: {error}") from error


def _is_flow(scheduler: Any) -> bool:
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas", False))


@lru_cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the function's parameters."""
    return frozenset(inspect.signature(function).parameters)
