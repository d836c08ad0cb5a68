"""The arithmetic of one lane's denoise steps, around the denoiser.

A diffusers scheduler's step costs some 200 µs of Python, ten lanes' steps 2 ms. But for those that neither draw noise
nor clip, every sample is a fixed linear combination of the initial latents and the predictions so far. Its weights
are found by running the scheduler once over unit vectors; from then on a step is one product of a row with a matrix.
Whether a scheduler really is linear is tried out on random numbers, never assumed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from inference.parameters import parameters_of
from inference.request import RequestFailed
from inference.schedulers import SchedulerTable, set_timesteps

MAX_TRAJECTORIES = 256
# fp32 rounding over a hundred steps stays below 1e-4; a step's own noise or a clipped value is far above.
LINEAR_TOLERANCE = 1e-3


class Sampler(Protocol):
    """The denoise steps of one lane. `latents` [channels, height, width], fp32, change only by `advance`."""

    latents: torch.Tensor

    @property
    def num_steps(self) -> int: ...
    @property
    def step_index(self) -> int: ...
    @property
    def timestep(self) -> float: ...

    def model_input(self) -> torch.Tensor:
        """The latents as the denoiser wants them at `timestep`."""
        ...

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one step with the denoiser's prediction, of the latents' shape."""
        ...


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A linear scheduler's whole course. `weights[i]` combines (initial latents, prediction 0 … prediction i) into the
    latents after step i; `scales[i]` is what `scale_model_input` multiplies by."""

    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    init_noise_sigma: float
    weights: torch.Tensor


class TrajectorySampler:
    """A lane on a known trajectory. Keeps all predictions: one latents' size a step, 16 kB × 4 at 512 pixels."""

    def __init__(self, trajectory: Trajectory, noise: torch.Tensor) -> None:
        self._trajectory = trajectory
        self._weights = trajectory.weights.to(noise.device)
        self._course = noise.new_zeros(self.num_steps + 1, noise.numel())
        self._course[0] = noise.flatten() * trajectory.init_noise_sigma
        self.latents = self._course[0].view(noise.shape)
        self.step_index = 0

    @property
    def num_steps(self) -> int:
        return len(self._trajectory.timesteps)

    @property
    def timestep(self) -> float:
        return self._trajectory.timesteps[self.step_index]

    def model_input(self) -> torch.Tensor:
        scale = self._trajectory.scales[self.step_index]
        return self.latents if scale == 1.0 else self.latents * scale

    def advance(self, prediction: torch.Tensor) -> None:
        index = self.step_index
        self._course[index + 1] = prediction.flatten()
        self.latents = (self._weights[index, : index + 2] @ self._course[: index + 2]).view(self.latents.shape)
        self.step_index = index + 1


class SchedulerSampler:
    """A lane with a diffusers scheduler of its own, for those that draw noise or clip at every step."""

    def __init__(self, scheduler: Any, noise: torch.Tensor, generator: torch.Generator) -> None:
        """`scheduler` has its timesteps set; `generator` goes on where it drew `noise`."""
        self._scheduler = scheduler
        self._generator = generator
        self.latents = noise * _init_noise_sigma(scheduler)
        self.step_index = 0

    @property
    def num_steps(self) -> int:
        return len(self._scheduler.timesteps)

    @property
    def timestep(self) -> float:
        return float(self._scheduler.timesteps[self.step_index])

    def model_input(self) -> torch.Tensor:
        # The schedulers expect a batch dimension.
        now = self._scheduler.timesteps[self.step_index]
        return _scale_model_input(self._scheduler, self.latents[None], now)[0]

    def advance(self, prediction: torch.Tensor) -> None:
        # Most schedulers look themselves up by timestep; few take a generator, the deterministic ones ignore it.
        now = self._scheduler.timesteps[self.step_index]
        self.latents = _step(self._scheduler, prediction[None], now, self.latents[None], self._generator)[0]
        self.step_index += 1


class Samplers:
    """Maker of samplers for one checkpoint. Remembers the trajectories it found."""

    def __init__(self, table: SchedulerTable, scheduler_config: Any) -> None:
        self._table = table
        self._config = scheduler_config
        self._trajectory = lru_cache(MAX_TRAJECTORIES)(self._find_trajectory)

    @property
    def names(self) -> tuple[str, ...]:
        """The schedulers a job may name."""
        return self._table.names

    def prepare(self, name: str | None, num_steps: int, shift: float | None = None) -> None:
        """Find the trajectory, which takes some milliseconds, ahead of `begin`; `shift` as `set_timesteps` takes it.

        Raises `RequestFailed` where there is no such scheduler, or it cannot take so many steps.
        """
        name, _ = self._table.make(name, self._config)
        self._trajectory(name, num_steps, shift)

    def begin(
        self,
        name: str | None,
        num_steps: int,
        noise: torch.Tensor,
        generator: torch.Generator,
        shift: float | None = None,
    ) -> tuple[str, Sampler]:
        """A sampler at its first step, and the scheduler's name. `noise` is standard normal, fp32, on the device."""
        name, scheduler = self._table.make(name, self._config)
        trajectory = self._trajectory(name, num_steps, shift)
        if trajectory is not None:
            return name, TrajectorySampler(trajectory, noise)
        set_timesteps(scheduler, num_steps, shift)
        return name, SchedulerSampler(scheduler, noise, generator)

    def _find_trajectory(self, name: str, num_steps: int, shift: float | None) -> Trajectory | None:
        def scheduler() -> Any:
            _, fresh = self._table.make(name, self._config)
            set_timesteps(fresh, num_steps, shift)
            return fresh

        try:
            found = _trace(scheduler())
        except IndexError as error:
            # diffusers' own mistake where two timesteps round to one: it begins with the second and runs off the end.
            reason = f"scheduler {name!r} cannot take {num_steps} steps with this checkpoint: ask for other steps"
            raise RequestFailed("INVALID_INPUT", reason) from error
        return found if _describes(found, scheduler()) else None


def _trace(scheduler: Any) -> Trajectory:
    """Run `scheduler` over unit vectors: the sample's components are then the weights of each input."""
    times = scheduler.timesteps
    units = torch.eye(len(times) + 1)[:, None, :, None, None]  # [input, batch 1, component, 1, 1]
    sample = units[0]
    generator = torch.Generator()
    scales: list[float] = []
    weights: list[torch.Tensor] = []
    for time, unit in zip(times, units[1:], strict=True):
        scales.append(float(_scale_model_input(scheduler, torch.ones(1, 1, 1, 1), time)))
        sample = _step(scheduler, unit, time, sample, generator)
        weights.append(sample.flatten())
    return Trajectory(
        timesteps=tuple(float(time) for time in times),
        scales=tuple(scales),
        init_noise_sigma=_init_noise_sigma(scheduler),
        weights=torch.stack(weights),
    )


def _describes(trajectory: Trajectory, scheduler: Any) -> bool:
    """Does the trajectory lead where `scheduler` leads, from random latents by random predictions?"""
    generator = torch.Generator().manual_seed(0)
    # Three times the usual size, so that what clips does clip.
    noise = 3 * torch.randn(4, 8, 8, generator=generator)
    ours: Sampler = TrajectorySampler(trajectory, noise)
    theirs: Sampler = SchedulerSampler(scheduler, noise, generator)
    for _ in trajectory.timesteps:
        theirs.model_input()  # some schedulers insist on being asked
        prediction = torch.randn(4, 8, 8, generator=generator)
        ours.advance(prediction)
        theirs.advance(prediction)
    error = (ours.latents - theirs.latents).abs().max() / theirs.latents.abs().max()
    return bool(error < LINEAR_TOLERANCE)


def _step(
    scheduler: Any, prediction: torch.Tensor, time: Any, sample: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One step of any diffusers scheduler; those that draw noise get `generator`."""
    extra = {"generator": generator} if "generator" in parameters_of(type(scheduler).step) else {}
    stepped: torch.Tensor = scheduler.step(prediction, time, sample, return_dict=False, **extra)[0]
    return stepped


def _scale_model_input(scheduler: Any, sample: torch.Tensor, time: Any) -> torch.Tensor:
    """As a diffusers pipeline scales it; a flow's schedulers have nothing to scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: torch.Tensor = sample if scale is None else scale(sample, time)
    return scaled


def _init_noise_sigma(scheduler: Any) -> float:
    """What a course begins with: so many times the noise. A flow begins with the noise itself."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))
