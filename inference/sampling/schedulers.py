"""The diffusers schedulers a job may name: one table for diffusion models, one for flows."""

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
    """Schedulers by name. `makers` make one from the checkpoint's own scheduler config."""

    default: str
    makers: Mapping[str, Callable[[Any], Any]]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.makers)

    def make(self, name: str | None, config: Any) -> tuple[str, Any]:
        """Make a fresh scheduler by `name` (None: the default). Returns its name too.

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


def _heun(config: Any) -> Any:
    """Return Heun's scheduler with the config's noise levels: its class ignores a rescaling to zero terminal SNR."""
    if not config.get("rescale_betas_zero_snr"):
        return diffusers.HeunDiscreteScheduler.from_config(config)
    # The last is not 0 but what every class that rescales takes for it.
    alphas_cumprod = diffusers.EulerDiscreteScheduler.from_config(config).alphas_cumprod.numpy().astype(float)
    betas = 1 - alphas_cumprod / np.concatenate(([1.0], alphas_cumprod[:-1]))
    return diffusers.HeunDiscreteScheduler.from_config(config, trained_betas=betas.tolist())


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
        "heun": _heun,
        "lcm": diffusers.LCMScheduler.from_config,
    },
)
# The scheduler of its published checkpoints, turbo and lightning ones included.
SDXL = replace(DIFFUSION, default="euler")


def _flow_solver(solver: Any) -> Callable[[Any], Any]:
    """Return the maker of a diffusion solver configured for a flow, with the checkpoint's shift."""

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


def set_timesteps(scheduler: Any, num_steps: int, shift: float | None = None, *, has_own_sigmas: bool = False) -> None:
    """Set the timesteps of `num_steps`. `shift` is a flow's `mu` where it depends on the size of the image.

    A flow's sigmas are passed as by `ZImagePipeline`, from 1 down to 1 / num_steps, where a scheduler takes them: its
    default would end elsewhere. With `has_own_sigmas` a diffusion solver takes its default, as by `FluxPipeline`.
    """
    takes = parameters_of(type(scheduler).set_timesteps)
    given: dict[str, Any] = {}
    is_solver = scheduler.config.get("use_flow_sigmas", False)
    is_flow = "FlowMatch" in type(scheduler).__name__ or (is_solver and not has_own_sigmas)
    if "sigmas" in takes and is_flow:
        # An array: UniPC multiplies it.
        given["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    if "mu" in takes and shift is not None:
        given["mu"] = shift
    try:
        scheduler.set_timesteps(num_steps, **given)
    except ValueError as error:
        raise RequestFailed("INVALID_INPUT", f"the scheduler cannot take {num_steps} steps: {error}") from error


@lru_cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the function's parameters: diffusers' schedulers differ in them."""
    return frozenset(inspect.signature(function).parameters)
