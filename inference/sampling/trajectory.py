"""A scheduler's steps as plain numbers: when they are, how much noise is left, and what each makes of those before it.

A diffusers scheduler's step costs some 200 µs of Python, ten lanes' steps 2 ms. But for those that do not clip, every
step is a fixed linear combination of the samples it was given, the predictions made of them and the noise it draws. The
weights are found by running the scheduler once over unit vectors; from then on a step is one product of a row with a
matrix, whatever was done to the samples in between.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from inference.sampling.noise import SuppliedNoise
from inference.sampling.schedulers import parameters_of, set_timesteps


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The steps that `scheduler` (None: the default) takes in `num_steps`.

    `shift` as `set_timesteps` takes it. A lane with a source leaves out the first `num_skipped`; None, unlike 0, is how
    a lane without one begins: the schedulers differ in it where two of their timesteps are equal.
    """

    scheduler: str | None
    num_steps: int
    shift: float | None = None
    num_skipped: int | None = None

    def named(self, scheduler: str) -> "StepPlan":
        return replace(self, scheduler=scheduler)

    def set_up(self, scheduler: Any) -> torch.Tensor:
        """Have a fresh diffusers scheduler begin the course, and return the timesteps that it will take."""
        set_timesteps(scheduler, self.num_steps, self.shift)
        times: torch.Tensor = scheduler.timesteps
        if self.num_skipped is None:
            return times
        begin = self.num_skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return times[begin:]


class NoiseLevel(NamedTuple):
    """A noised picture is `signal` times the picture and `noise` times the noise."""

    signal: float
    noise: float

    def applied(self, picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.add(picture * self.signal, noise, alpha=self.noise)


@dataclass(frozen=True, slots=True)
class LinearTrajectory:
    """What is known of a course ahead.

    `scales[i]` is what `scale_model_input` multiplies by. `levels[i]` is a picture's noise level before step i, the
    last one that of the finished picture; none where the course has no source. `draws[i]`: step i draws noise, of the
    sample's shape. `weights[i]` [last steps, 2 or 3] combines what the last steps were given into the sample after step
    i: that of step j is at j modulo their number, its sample, its prediction and, where any step draws, its noise. None
    of a scheduler whose steps are not linear.
    """

    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    init_noise_sigma: float
    levels: tuple[NoiseLevel, ...]
    draws: tuple[bool, ...]
    weights: torch.Tensor | None


def derive_trajectory(plan: StepPlan, scheduler: Any) -> LinearTrajectory:
    """Run a fresh `scheduler` over unit vectors: what it makes of them are the weights."""
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
            levels.append(_noise_level(scheduler, times[index : index + 1]))
        scales.append(float(scale_model_input(scheduler, torch.ones(1, 1, 1, 1), time)))
        stepped, is_drawn = _step_with(noise, scheduler, prediction, time, sample)
        draws.append(is_drawn)
        weights.append(stepped.view(len(times), 3))
    return LinearTrajectory(
        timesteps=tuple(float(time) for time in times),
        scales=tuple(scales),
        # A flow begins with the noise itself.
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        levels=(*levels, NoiseLevel(1.0, 0.0)) if is_noised else (),
        draws=tuple(draws),
        weights=_wrapped(torch.stack(weights)[..., : 3 if any(draws) else 2]),
    )


def _step_with(
    noise: torch.Tensor, scheduler: Any, prediction: torch.Tensor, time: Any, sample: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Take a step for which `noise` is what the scheduler draws. Returns the next sample, and whether it drew."""
    generator = torch.Generator()
    with SuppliedNoise(generator, lambda _: noise) as supplied:
        stepped = take_step(scheduler, prediction, time, sample, generator)
    return stepped, supplied.num_supplied > 0


def _wrapped(weights: torch.Tensor) -> torch.Tensor:
    """Weights [steps, steps, 2 or 3] of what all steps were given, cut to the steps that are looked back to."""
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
    """One step of any diffusers scheduler; those that draw noise get `generator`."""
    extra = {"generator": generator} if "generator" in parameters_of(type(scheduler).step) else {}
    stepped: torch.Tensor = scheduler.step(prediction, time, sample, return_dict=False, **extra)[0]
    return stepped


def scale_model_input(scheduler: Any, sample: torch.Tensor, time: Any) -> torch.Tensor:
    """As a diffusers pipeline scales it; a flow's schedulers have nothing to scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: torch.Tensor = sample if scale is None else scale(sample, time)
    return scaled


def _noise_level(scheduler: Any, times: torch.Tensor) -> NoiseLevel:
    """How noisy the scheduler wants a picture before its present step, which is at `times` [1]."""
    picture, noise = torch.eye(2)[:, None, :, None, None]  # [batch 1, component, 1, 1]
    if hasattr(scheduler, "scale_noise"):
        noised = scheduler.scale_noise(picture, times, noise)
    else:
        noised = scheduler.add_noise(picture, noise, times)
    return NoiseLevel(*noised.flatten().tolist())
