"""Models that take turns on the device: one at a time, all of them in host memory.

diffusers' own offload moves out only the model that comes before in the pipeline's order: enough where each runs in its
turn. The engine encodes a prompt between two steps of others' pictures, and all would end up on the device together.
"""

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device


class DeviceSlot:
    """The one place on the device, and owner of which model has it. Of the engine's one thread.

    Weights are never written, so those in host memory stay, and leaving the device costs no copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._taken_by: torch.nn.Module | None = None
        self._in_host_memory: dict[torch.Tensor, torch.Tensor] = {}

    def take(self, model: torch.nn.Module) -> None:
        """Have `model` on the device, and none beside it."""
        if self._taken_by is model:
            return
        self._clear()
        self._taken_by = model
        self._in_host_memory = {tensor: tensor.data for tensor in (*model.parameters(), *model.buffers())}
        for tensor, host in self._in_host_memory.items():
            tensor.data = host.to(self.device, copy=True)

    def _clear(self) -> None:
        self._taken_by = None
        for tensor, host in self._in_host_memory.items():
            tensor.data = host
        self._in_host_memory = {}


class _TakesSlot(ModelHook):  # type: ignore[misc]
    """Runs before `forward`, and before what diffusers decorates like it: a VAE's `encode` and `decode`."""

    def __init__(self, slot: DeviceSlot) -> None:
        self._slot = slot
        # Where a pipeline looks for the device it runs on.
        self.execution_device = slot.device

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._slot.take(module)
        return send_to_device(args, self._slot.device), send_to_device(kwargs, self._slot.device)


def offload_in_turns(pipeline: Any, device: torch.device) -> None:
    """From now on each model of the pipeline, which are in host memory, is on the device whenever it is called."""
    slot = DeviceSlot(device)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            add_hook_to_module(model, _TakesSlot(slot), append=True)


def ensure_on_device(model: torch.nn.Module) -> None:
    """Have the model on the device where models take turns: for those who call parts of it and not the whole."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)
