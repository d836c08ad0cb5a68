"""Muon for matrices, as Keller Jordan published it: momentum, made orthogonal before each step.

The update's size is matched to AdamW's (0.2 times the root of the longer side, as Moonshot AI's "Muon is Scalable for
LLM Training" has it), so that one learning rate serves both.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

MOMENTUM = 0.95
# The quintic of Newton and Schulz that drives singular values towards one, fast rather than exactly.
QUINTIC = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
MATCHED_RMS = 0.2

Job = Callable[[], None]
RunJobs = Callable[[Sequence[Job]], None]


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions or more; a convolution's kernel counts as one row for each output channel.

    Matrices of one shape are updated as one stack. `run_jobs` runs the stacks' jobs, which touch nothing in common.
    """

    def __init__(self, params: Iterable[Any], lr: float, run_jobs: RunJobs, precision: torch.dtype) -> None:
        super().__init__(params, {"lr": lr})
        self._run_jobs = run_jobs
        self._precision = precision

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        jobs: list[tuple[int, Job]] = []
        for group in self.param_groups:
            for stack in _stacks(group["params"]):
                for parameter in stack:
                    self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                work = len(stack) * stack[0].numel()
                jobs.append((work, partial(self._update, stack, group["lr"])))
        # The longest first, so that two workers end at about the same time.
        self._run_jobs([job for _, job in sorted(jobs, key=lambda job: -job[0])])

    @torch.no_grad()
    def _update(self, stack: list[torch.Tensor], lr: float) -> None:
        gradients = [parameter.grad for parameter in stack if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum"] for parameter in stack]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch.stack([torch.lerp(g, m, MOMENTUM) for g, m in zip(gradients, momenta, strict=True)]).flatten(2)
        orthogonal = orthogonalise(updates, self._precision)
        size = lr * MATCHED_RMS * max(updates.shape[-2:]) ** 0.5
        torch._foreach_sub_(stack, [one.view_as(p) for one, p in zip(orthogonal * size, stack, strict=True)])


def orthogonalise(matrices: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """Approximate the nearest semi-orthogonal matrices: singular values come out between 0.6 and 1.2."""
    a, b, c = QUINTIC
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if is_tall else matrices).to(precision)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()


def _stacks(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    stacks: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            stacks[parameter.shape].append(parameter)
    return list(stacks.values())
