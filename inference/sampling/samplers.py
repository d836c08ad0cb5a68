"""Samplers: the denoise steps of one lane, around the denoiser.

Where a scheduler's steps are linear they are taken from a trajectory derived once, see `trajectory.py`. Whether a
scheduler is linear is tested on random numbers, never assumed.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import torch

from inference.device.uploads import pinned, upload
from inference.sampling.noise import SuppliedNoise
from inference.sampling.schedulers import SchedulerTable
from inference.sampling.source_blend import NO_SOURCE, SourceBlend, SourceLatents
from inference.sampling.trajectory import LinearTrajectory, StepPlan, derive_trajectory, scale_model_input, take_step

TRAIN_TIMESTEPS = 1000

MAX_TRAJECTORIES = 256
# fp32 rounding over a hundred steps stays below 1e-4; a clipped value is far above.
LINEAR_TOLERANCE = 1e-3


class Sampler(Protocol):
    """The denoise steps of one lane. `latents` [channels, height, width], fp32, change only by `advance`."""

    @property
    def latents(self) -> torch.Tensor: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def step_index(self) -> int: ...
    @property
    def timestep(self) -> float: ...

    def model_input(self) -> torch.Tensor:
        """Return the denoiser's input at `timestep`: the scaled latents, and its other channels."""
        ...

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one step with the denoiser's prediction, of the latents' shape."""
        ...


class TrajectorySampler:
    """A lane on a linear trajectory. Keeps the last samples, predictions and noise that its steps combine."""

    def __init__(self, trajectory: LinearTrajectory, blend: SourceBlend, generator: torch.Generator) -> None:
        """Start from `blend`. The weights of `trajectory` are on the lane's device; `generator` drew its noise."""
        assert trajectory.weights is not None, "a linear scheduler's"  # noqa: S101
        self._trajectory = trajectory
        self._blend = blend
        self._generator = generator
        self.latents = blend.start
        self._num_parts = trajectory.weights.shape[-1]
        self._weights = trajectory.weights.flatten(1)
        self._recent = self.latents.new_zeros(self._weights.shape[1], self.latents.numel())
        self.step_index = 0

    @property
    def num_steps(self) -> int:
        return len(self._trajectory.timesteps)

    @property
    def timestep(self) -> float:
        return self._trajectory.timesteps[self.step_index]

    def model_input(self) -> torch.Tensor:
        scale = self._trajectory.scales[self.step_index]
        return self._blend.extended(self.latents if scale == 1.0 else self.latents * scale)

    def advance(self, prediction: torch.Tensor) -> None:
        index = self.step_index
        row = index * self._num_parts % len(self._recent)
        self._recent[row] = self.latents.flatten()
        self._recent[row + 1] = prediction.flatten()
        if self._trajectory.draws[index]:
            noise = torch.randn(self.latents.numel(), generator=self._generator)
            self._recent[row + 2].copy_(pinned(noise, self.latents.device), non_blocking=True)
        num_filled = min((index + 1) * self._num_parts, len(self._recent))
        stepped = (self._weights[index, :num_filled] @ self._recent[:num_filled]).view(self.latents.shape)
        self.step_index = index + 1
        self.latents = self._blend.blended(stepped, self.step_index)


class SchedulerSampler:
    """A lane with a diffusers scheduler of its own, for those that clip at every step."""

    def __init__(
        self,
        scheduler: Any,
        times: torch.Tensor,
        draws: Sequence[bool],
        blend: SourceBlend,
        generator: torch.Generator,
    ) -> None:
        """Start from `blend`, with `scheduler` set up to take `times`; `generator` drew the lane's noise.

        `draws`: whether each step draws noise.
        """
        self._scheduler = scheduler
        self._times = times
        self._draws = draws
        self._blend = blend
        self._generator = generator
        self.latents = blend.start
        self.step_index = 0

    @property
    def num_steps(self) -> int:
        return len(self._times)

    @property
    def timestep(self) -> float:
        return float(self._times[self.step_index])

    def model_input(self) -> torch.Tensor:
        # The schedulers expect a batch dimension.
        scaled = scale_model_input(self._scheduler, self.latents[None], self._times[self.step_index])[0]
        return self._blend.extended(scaled)

    def advance(self, prediction: torch.Tensor) -> None:
        # Most schedulers find their step by timestep; few take a generator, the deterministic ones ignore it.
        now = self._times[self.step_index]
        # Not at every step: it makes each call of torch some microseconds slower.
        with SuppliedNoise(self._generator, self._draw) if self._draws[self.step_index] else nullcontext():
            stepped = take_step(self._scheduler, prediction[None], now, self.latents[None], self._generator)[0]
        self.step_index += 1
        self.latents = self._blend.blended(stepped, self.step_index)

    def _draw(self, shape: Sequence[int]) -> torch.Tensor:
        # The scheduler's own copy of it to the device would wait for the step that is running.
        return upload(torch.randn(shape, generator=self._generator), self.latents.device)


class Samplers:
    """Factory of samplers for one checkpoint, with a cache of trajectories."""

    def __init__(self, table: SchedulerTable, scheduler_config: Any) -> None:
        self._table = table
        self._config = scheduler_config
        self._trajectory = lru_cache(MAX_TRAJECTORIES)(self._find_trajectory)
        # Lanes of one plan share them on the device.
        self._weights = lru_cache(MAX_TRAJECTORIES)(self._upload_weights)

    @property
    def names(self) -> tuple[str, ...]:
        """The schedulers a job may name."""
        return self._table.names

    def prepare(self, plan: StepPlan) -> None:
        """Derive the trajectory, which takes some milliseconds, ahead of `begin`.

        Raises `RequestFailed` for an unknown scheduler, or one that cannot take this number of steps.
        """
        self._trajectory(self._named(plan))

    def begin(
        self, plan: StepPlan, noise: torch.Tensor, generator: torch.Generator, source: SourceLatents = NO_SOURCE
    ) -> tuple[str, Sampler]:
        """Return a sampler at its first step, and the scheduler's name. `noise`: normal, fp32, on the device."""
        named = self._named(plan)
        trajectory = self._trajectory(named)
        blend = SourceBlend(trajectory, noise, source)
        weights = self._weights(named, blend.start.device)
        if weights is not None:
            return str(named.scheduler), TrajectorySampler(replace(trajectory, weights=weights), blend, generator)
        scheduler = self._scheduler(named)
        times = named.set_up(scheduler)
        return str(named.scheduler), SchedulerSampler(scheduler, times, trajectory.draws, blend, generator)

    def _named(self, plan: StepPlan) -> StepPlan:
        self._table.check(plan.scheduler)
        return plan.named(plan.scheduler or self._table.default)

    def _upload_weights(self, plan: StepPlan, device: torch.device) -> torch.Tensor | None:
        weights = self._trajectory(plan).weights
        return None if weights is None else upload(weights, device)

    def _find_trajectory(self, plan: StepPlan) -> LinearTrajectory:
        found = derive_trajectory(plan, self._scheduler(plan))
        return found if _describes(found, plan, self._scheduler(plan)) else replace(found, weights=None)

    def _scheduler(self, plan: StepPlan) -> Any:
        return self._table.make(plan.scheduler, self._config)[1]


def _describes(trajectory: LinearTrajectory, plan: StepPlan, scheduler: Any) -> bool:
    """Return whether trajectory and `scheduler` end equal, from random latents, random predictions and equal noise."""
    generator, ours_drawn_by, theirs_drawn_by = (torch.Generator().manual_seed(seed) for seed in (0, 1, 1))
    # Three times the usual size, so that a scheduler that clips does clip.
    blend = SourceBlend(trajectory, 3 * torch.randn(4, 8, 8, generator=generator), NO_SOURCE)
    ours: Sampler = TrajectorySampler(trajectory, blend, ours_drawn_by)
    theirs = blend.start[None]
    for time in plan.set_up(scheduler):
        scale_model_input(scheduler, theirs, time)  # some schedulers raise without this call
        prediction = torch.randn(4, 8, 8, generator=generator)
        ours.advance(prediction)
        theirs = take_step(scheduler, prediction[None], time, theirs, theirs_drawn_by)
    error = (ours.latents - theirs[0]).abs().max() / theirs.abs().max()
    drew_alike = torch.equal(ours_drawn_by.get_state(), theirs_drawn_by.get_state())
    return bool(error < LINEAR_TOLERANCE) and drew_alike


def predict_x0(
    model_input: torch.Tensor, timestep: float, prediction: torch.Tensor, checkpoint_scheduler: Any
) -> torch.Tensor:
    """Return the x0 implied by a prediction at `timestep`; all of one shape, in the sampler's scale.

    It depends on the prediction alone, not on the scheduler of the steps: the model's inputs are in one scale for all.
    `checkpoint_scheduler` is the checkpoint's own, with the noise of training and the type of prediction. A diffusion's
    input is sqrt(a) x0 + sqrt(1 - a) noise (Ho et al. 2020, eq. 4; the velocity as in Salimans and Ho 2022), a flow's
    (1 - s) x0 + s noise.
    """
    alphas = getattr(checkpoint_scheduler, "alphas_cumprod", None)
    if alphas is None:
        return model_input - timestep / TRAIN_TIMESTEPS * prediction
    alpha = float(alphas[round(timestep)])
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    match checkpoint_scheduler.config.get("prediction_type", "epsilon"):
        case "v_prediction":
            return signal * model_input - noise * prediction
        case "sample":
            return prediction
        case _:
            return (model_input - noise * prediction) / signal
