"""Models that take turns on the device: one at a time, the others in host memory.

diffusers' own offload moves out only the model that comes before in the pipeline's order: enough where each runs in its
turn. The engine encodes a prompt between two steps of others' pictures, and all would end up on the device together.
"""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]


class Seat:
    """The one place on the device, and owner of which model has it. Of the engine's one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._taken_by: Any = None

    def take(self, model: Any) -> None:
        """Have `model` on the device and the one that was there back in host memory."""
        if self._taken_by is model:
            return
        if self._taken_by is not None:
            self._taken_by.to("cpu")
        self._taken_by = model
        model.to(self.device)


class _TakesSeat(ModelHook):  # type: ignore[misc]
    """Runs before `forward`, and before what diffusers decorates like it: a VAE's `encode` and `decode`."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        # Where a pipeline looks for the device it runs on.
        self.execution_device = seat.device

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._seat.take(module)
        return send_to_device(args, self._seat.device), send_to_device(kwargs, self._seat.device)


def take_turns(pipeline: Any, device: torch.device) -> None:
    """Put every model of the pipeline in host memory, and on the device whenever it is called."""
    seat = Seat(device)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.to("cpu")
            add_hook_to_module(model, _TakesSeat(seat), append=True)
