"""The one training loop: micro-batches to the workers, the mean gradient to the optimisers, an average of the weights.

A loss is a function of the weights, the step and the micro-batch alone, with every draw seeded by the last two; so a
training that was interrupted goes on as if nothing had happened, and a busy machine changes the time and nothing else.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from examples.demo_model.recipe.optimizer import Muon
from examples.demo_model.recipe.settings import SEED, bar_seconds
from examples.demo_model.recipe.workers import Workers

CHECKPOINT_SECONDS = 60.0
WARM_UP_STEPS = 50
AVERAGE_DECAY = 0.999
NUM_LOSSES = 40  # points of the curve that the card shows


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How one network is trained. `rates`: the peak learning rates by the beginning of the parameters' names."""

    name: str
    num_steps: int
    batch: int
    rates: Mapping[str, float]
    uses_muon: bool = True


class Draws:
    """The random choices of one micro-batch: `rng` for Python's, `normal` and `uniform` for tensors'."""

    def __init__(self, course: str, step: int, part: int) -> None:
        self.rng = random.Random(f"{SEED} {course} {step} {part}")
        self._generator = torch.Generator().manual_seed(self.rng.getrandbits(63))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator)


# The mean loss of micro-batch `part` (of as many as there are workers) of a step.
LossOf = Callable[[int, int], torch.Tensor]


@dataclass
class _Progress:
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class _Training:
    """Owner of a network while it is trained."""

    def __init__(self, network: nn.Module, course: TrainingPlan, workers: Workers) -> None:
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        self.progress = _Progress()
        self._course, self._workers = course, workers
        self._optimizers = _optimizers(named, course, workers)

    def step(self, loss_of: LossOf) -> float:
        """Run one step; return its loss."""
        number = self.progress.step
        parts = self._workers.map(lambda part: self._gradients(loss_of, number, part), range(self._workers.num))
        for parameter, *gradients in zip(self.parameters, *(part[1] for part in parts), strict=True):
            present = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = sum(present[1:], present[0]) / len(parts) if present else None
        self._set_rates(number)
        for optimizer in self._optimizers:
            optimizer.step()
        decay = min(AVERAGE_DECAY, (1 + number) / (10 + number))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        loss = sum(part[0] for part in parts) / len(parts)
        self.progress.step += 1
        self.progress.losses.append(loss)
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the averages in the network."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.copy_(average)
            parameter.grad = None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        state = {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "averages": self.averages,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "progress": vars(self.progress),
        }
        torch.save(state, partial)
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self._workers.device, weights_only=True)
        for name in ("parameters", "averages"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.copy_(saved)
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = _Progress(**state["progress"])

    def _gradients(self, loss_of: LossOf, step: int, part: int) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        with self._workers.autocast():
            loss = loss_of(step, part)
        return float(loss.detach()), torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _set_rates(self, step: int) -> None:
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / self._course.num_steps)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor


def train(
    network: nn.Module, loss_of: LossOf, course: TrainingPlan, workers: Workers, progress_file: Path
) -> dict[str, object]:
    """Train what in `network` requires gradients, resuming from `progress_file` if it exists; return the figures.

    The file stays: the caller removes it once the result is saved.
    """
    network.train()
    training = _Training(network, course, workers)
    if progress_file.exists():
        training.load(progress_file)
    progress = training.progress
    begun_at = time.monotonic() - progress.seconds
    saved_at = time.monotonic()
    bar = tqdm(total=course.num_steps, initial=progress.step, desc=course.name, mininterval=bar_seconds())
    with bar:
        while progress.step < course.num_steps:
            loss = training.step(loss_of)
            if not math.isfinite(loss):
                raise ArithmeticError(f"the loss of {course.name} is {loss} at step {progress.step}")
            bar.set_postfix(loss=f"{_recent(progress.losses):.4f}", refresh=False)
            bar.update()
            progress.seconds = time.monotonic() - begun_at
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                training.save(progress_file)
                saved_at = time.monotonic()
    training.finish()
    network.eval()
    return {
        "steps": course.num_steps,
        "batch": course.batch,
        "seconds": round(progress.seconds, 1),
        "losses": _curve(progress.losses),
        "num_parameters": sum(parameter.numel() for parameter in training.parameters),
    }


def _optimizers(
    named: list[tuple[str, nn.Parameter]], course: TrainingPlan, workers: Workers
) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices that a signal passes through, AdamW for what looks up, scales and shifts."""
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in named:
        rate = next(rate for beginning, rate in course.rates.items() if name.startswith(beginning))
        is_matrix = course.uses_muon and parameter.ndim >= 2 and "embedding.weight" not in name
        (matrices if is_matrix else others).append({"params": [parameter], "peak": rate})
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(_by_rate(matrices), 0.0, workers.run, workers.precision))
    if others:
        optimizers.append(torch.optim.AdamW(_by_rate(others), 0.0, betas=(0.9, 0.99), weight_decay=0.0, foreach=True))
    return optimizers


def _by_rate(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rates = dict.fromkeys(group["peak"] for group in groups)
    return [
        {"params": [p for group in groups if group["peak"] == rate for p in group["params"]], "peak": rate}
        for rate in rates
    ]


def _recent(losses: list[float]) -> float:
    last = losses[-50:]
    return sum(last) / len(last)


def _curve(losses: list[float]) -> list[float]:
    """Average the loss over equal stretches of the training."""
    stretch = max(1, len(losses) // NUM_LOSSES)
    pieces = [losses[start : start + stretch] for start in range(0, len(losses), stretch)]
    return [round(sum(piece) / len(piece), 4) for piece in pieces if len(piece) == stretch]
