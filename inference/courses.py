"""A scheduler's steps as plain numbers: when they are, how much noise is left, and what each makes of those before it.

A diffusers scheduler's step costs some 200 µs of Python, ten lanes' steps 2 ms. But for those that neither draw noise
nor clip, every step is a fixed linear combination of the samples it was given and the predictions made of them. The
weights are found by running the scheduler once over unit vectors; from then on a step is one product of a row with a
matrix, whatever was done to the samples in between.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from inference.parameters import parameters_of
from inference.schedulers import set_timesteps


@dataclass(frozen=True, slots=True)
class Course:
    """The steps that `scheduler` (None: the default) takes in `num_steps`.

    `shift` as `set_timesteps` takes it. A lane with a source leaves out the first `num_skipped`; None, unlike 0, is how
    a lane without one begins: the schedulers differ in it where two of their timesteps are equal.
    """

    scheduler: str | None
    num_steps: int
    shift: float | None = None
    num_skipped: int | None = None

    def named(self, scheduler: str) -> "Course":
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
class Trajectory:
    """What is known of a course ahead.

    `scales[i]` is what `scale_model_input` multiplies by. `levels[i]` is a picture's noise level before step i, the
    last one that of the finished picture; none where the course has no source. `weights[i]` combines the samples and
    predictions of the last steps into the sample after step i: those of step j stand at 2j and 2j + 1, modulo the
    number of columns. None of a scheduler whose steps are not linear.
    """

    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    init_noise_sigma: float
    levels: tuple[NoiseLevel, ...]
    weights: torch.Tensor | None


def trace(course: Course, scheduler: Any) -> Trajectory:
    """Run a fresh `scheduler` over unit vectors: what it makes of them are the weights."""
    times = course.set_up(scheduler)
    is_noised = course.num_skipped is not None
    units = torch.eye(2 * len(times))[:, None, :, None, None]  # [sample or prediction, batch 1, component, 1, 1]
    generator = torch.Generator()
    scales: list[float] = []
    levels: list[NoiseLevel] = []
    weights: list[torch.Tensor] = []
    for index, time in enumerate(times):
        if is_noised:
            levels.append(_noise_level(scheduler, times[index : index + 1]))
        scales.append(float(scale_model_input(scheduler, torch.ones(1, 1, 1, 1), time)))
        weights.append(take_step(scheduler, units[2 * index + 1], time, units[2 * index], generator).flatten())
    return Trajectory(
        timesteps=tuple(float(time) for time in times),
        scales=tuple(scales),
        # A flow begins with the noise itself.
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        levels=(*levels, NoiseLevel(1.0, 0.0)) if is_noised else (),
        weights=_wrapped(torch.stack(weights)),
    )


def _wrapped(weights: torch.Tensor) -> torch.Tensor:
    """Weights [steps, 2 · steps] of all samples and predictions, cut to those that the scheduler looks back to."""
    oldest = [min(row.nonzero().flatten().tolist(), default=2 * index) // 2 for index, row in enumerate(weights)]
    reach = max(index - step + 1 for index, step in enumerate(oldest))
    wrapped = weights[:, : 2 * reach].clone()
    for index in range(reach, len(weights)):
        first = 2 * (index - reach + 1)
        wrapped[index] = weights[index, first : first + 2 * reach].roll(first)
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
