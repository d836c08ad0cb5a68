"""A scheduler's steps as plain numbers: timesteps, noise levels, and the linear weights of each step.

A diffusers scheduler's step costs some 200 µs of Python, ten lanes' steps 2 ms. But for those that do not clip, every
step is a fixed linear combination of the samples it was given, the predictions made of them and the noise it draws. The
weights are found by running the scheduler once over unit vectors; from then on a step is one product of a row with a
matrix, also where the samples are changed between steps.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from inference.sampling.noise import SuppliedNoise
from inference.sampling.schedulers import parameters_of, set_timesteps


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The steps that `scheduler` (None: the default) takes in `num_steps`.

    `shift` and `has_own_sigmas` as in `set_timesteps`. A lane with a source skips the first `num_skipped`; None is a
    lane without one.
    """

    scheduler: str | None
    num_steps: int
    shift: float | None = None
    num_skipped: int | None = None
    has_own_sigmas: bool = False

    def named(self, scheduler: str) -> "StepPlan":
        """Return the plan with this scheduler."""
        return replace(self, scheduler=scheduler)

    def set_up(self, scheduler: Any) -> torch.Tensor:
        """Set up a fresh diffusers scheduler for the plan, and return the timesteps that it will take."""
        set_timesteps(scheduler, self.num_steps, self.shift, has_own_sigmas=self.has_own_sigmas)
        begin = (self.num_skipped or 0) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            # Also for 0. Where the first two timesteps round to one, as Karras' do with zero terminal SNR, diffusers
            # would begin with the second and run off the end.
            scheduler.set_begin_index(begin)
        times: torch.Tensor = scheduler.timesteps[begin:]
        return times


class NoiseLevel(NamedTuple):
    """Level of a noised image: `signal` times the image plus `noise` times the noise."""

    signal: float
    noise: float

    @classmethod
    def of(cls, scheduler: Any, times: torch.Tensor) -> "NoiseLevel":
        """Return the scheduler's noise level of a source before its present step, which is at `times` [1]."""
        image, noise = torch.eye(2)[:, None, :, None, None]  # [batch 1, component, 1, 1]
        if hasattr(scheduler, "scale_noise"):
            noised = scheduler.scale_noise(image, times, noise)
        else:
            noised = scheduler.add_noise(image, noise, times)
        return cls(*noised.flatten().tolist())

    def applied(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the image at this level."""
        return torch.add(image * self.signal, noise, alpha=self.noise)


@dataclass(frozen=True, slots=True)
class LinearTrajectory:
    """The steps of a plan, known ahead.

    `scales[i]` is the factor of `scale_model_input`. `levels[i]` is the source's noise level before step i, the last
    that of the finished image; empty without a source. `draws[i]`: step i draws noise, of the sample's shape.
    `weights[i]` [last steps, 2 or 3] combines the inputs of the last steps into the sample after step i: those of step
    j are at j modulo their number, its sample, its prediction and, where any step draws, its noise. None for a
    scheduler whose steps are not linear.
    """

    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    init_noise_sigma: float
    levels: tuple[NoiseLevel, ...]
    draws: tuple[bool, ...]
    weights: torch.Tensor | None


def derive_trajectory(plan: StepPlan, scheduler: Any) -> LinearTrajectory:
    """Run a fresh `scheduler` over unit vectors, whose images are the weights."""
    times = plan.set_up(scheduler)
    is_noised = plan.num_skipped is not None
    # [step, sample or prediction or noise, batch 1, component, 1, 1]
    units = torch.eye(3 * len(times)).view(len(times), 3, 1, -1, 1, 1)
    scales: list[float] = []
    levels: list[NoiseLevel] = []
    draws: list[bool] = []
    weights: list[torch.Tensor] = []
    for index, (time, (sample, prediction, noise)) in enumerate(zip(times, units, strict=True)):
        if is_noised:
            levels.append(NoiseLevel.of(scheduler, times[index : index + 1]))
        scales.append(float(scale_model_input(scheduler, torch.ones(1, 1, 1, 1), time)))
        stepped, is_drawn = _step_with(noise, scheduler, prediction, time, sample)
        draws.append(is_drawn)
        weights.append(stepped.view(len(times), 3))
    return LinearTrajectory(
        timesteps=tuple(float(time) for time in times),
        scales=tuple(scales),
        # A flow starts from the noise itself.
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        levels=(*levels, NoiseLevel(1.0, 0.0)) if is_noised else (),
        draws=tuple(draws),
        weights=_wrapped(torch.stack(weights)[..., : 3 if any(draws) else 2]),
    )


def _step_with(
    noise: torch.Tensor, scheduler: Any, prediction: torch.Tensor, time: Any, sample: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Take a step with `noise` as the scheduler's draw. Returns the next sample, and whether it drew."""
    generator = torch.Generator()
    with SuppliedNoise(generator, lambda _: noise) as supplied:
        stepped = take_step(scheduler, prediction, time, sample, generator)
    return stepped, supplied.num_supplied > 0


def _wrapped(weights: torch.Tensor) -> torch.Tensor:
    """Cut weights [steps, steps, 2 or 3] over all steps to a ring buffer of those with nonzero weights."""
    is_used = weights.any(-1)
    oldest = [min(row.nonzero().flatten().tolist(), default=index) for index, row in enumerate(is_used)]
    reach = max(index - step + 1 for index, step in enumerate(oldest))
    wrapped = weights[:, :reach].clone()
    for index in range(reach, len(weights)):
        first = index - reach + 1
        wrapped[index] = weights[index, first : first + reach].roll(first, dims=0)
    return wrapped


def take_step(
    scheduler: Any, prediction: torch.Tensor, time: Any, sample: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Take one step of any diffusers scheduler; those that draw noise get `generator`."""
    extra = {"generator": generator} if "generator" in parameters_of(type(scheduler).step) else {}
    stepped: torch.Tensor = scheduler.step(prediction, time, sample, return_dict=False, **extra)[0]
    return stepped


def scale_model_input(scheduler: Any, sample: torch.Tensor, time: Any) -> torch.Tensor:
    """Scale as a diffusers pipeline does; a flow's schedulers do not scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: torch.Tensor = sample if scale is None else scale(sample, time)
    return scaled
