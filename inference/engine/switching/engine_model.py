"""A model of the engine: its family, the loop of its requests, and its weights where they come and go."""

import math
from dataclasses import dataclass

from inference.checkpoints.offload import HostedWeights
from inference.engine.step_loop import StepLoop
from inference.engine.switching.decision import Standing
from inference.models.base import Family


@dataclass(eq=False)
class EngineModel:
    """One of the engine's models. `weights`: None where it never leaves the device.

    Times are `time.monotonic()`; `switch_seconds` is how long it took to come to the device the last time.
    """

    name: str
    family: Family
    loop: StepLoop
    weights: HostedWeights | None
    is_on_device: bool
    entered_at: float = 0.0
    used_at: float = 0.0
    switch_seconds: float = 0.0
    _num_begun_before: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the device that its weights and adapters take at most."""
        weights = 0 if self.weights is None else self.weights.num_bytes
        return weights + self.family.bank.max_bytes

    def standing(self) -> Standing:
        """Return its requests as the decision sees them."""
        waiting = self.loop.waiting
        return Standing(
            num_waiting=len(waiting),
            oldest_at=min((one.request.arrived_at for one in waiting), default=math.inf),
            num_running=self.loop.num_begun,
            entered_at=self.entered_at,
            has_begun=self.loop.num_begun_ever > self._num_begun_before,
        )

    def enter(self, now: float) -> None:
        """Copy the weights to the device. `torch.OutOfMemoryError`, with none of them there, where they do not fit."""
        if self.weights is not None:
            self.weights.enter()
        self.is_on_device, self.entered_at, self._num_begun_before = True, now, self.loop.num_begun_ever

    def leave(self) -> None:
        """Free its memory of the device; no request of it runs."""
        self.loop.evict_adapters()
        if self.weights is not None:
            self.weights.leave()
        self.is_on_device = False
