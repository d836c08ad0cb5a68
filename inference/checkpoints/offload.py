"""Offload models to host memory, with at most one on the device at a time.

diffusers' own offload moves out only the model before in the pipeline's order. The engine encodes prompts between the
steps of other requests: with it, all models would end up on the device together.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device


class HostedWeights:
    """Weights of models in host memory, which are copied to the device while the models are there.

    Weights are never written, so the originals stay valid, and leaving the device costs no copy. Used by the engine's
    thread alone.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._models = models
        self._device = device
        self._in_host_memory: dict[torch.Tensor, torch.Tensor] = {}

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that the weights take on the device."""
        return sum(tensor.nbytes for tensor in set(self._tensors()))

    def enter(self) -> None:
        """Copy the weights to the device. `torch.OutOfMemoryError`, with none of them there, where they do not fit."""
        self._in_host_memory = {tensor: tensor.data for tensor in self._tensors()}
        try:
            for tensor, host in self._in_host_memory.items():
                tensor.data = host.to(self._device, copy=True)
        except torch.OutOfMemoryError:
            self.leave()
            raise

    def leave(self) -> None:
        """Free the copies on the device."""
        for tensor, host in self._in_host_memory.items():
            tensor.data = host
        self._in_host_memory = {}

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (tensor for model in self._models for tensor in (*model.parameters(), *model.buffers()))


class DeviceSlot:
    """Owner of the one model's place on the device. Used by the engine's thread alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._taken_by: torch.nn.Module | None = None
        self._weights: HostedWeights | None = None

    def take(self, model: torch.nn.Module) -> None:
        """Move `model` to the device, and the model before it out."""
        if self._taken_by is model:
            return
        if self._weights is not None:
            self._weights.leave()
        self._taken_by = None
        self._weights = HostedWeights((model,), self.device)
        self._weights.enter()
        self._taken_by = model


class _TakesSlot(ModelHook):  # type: ignore[misc]
    """Runs before `forward`, and before what diffusers decorates like it: a VAE's `encode` and `decode`."""

    def __init__(self, slot: DeviceSlot) -> None:
        self._slot = slot
        # Pipelines read the device that they run on from here.
        self.execution_device = slot.device

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._slot.take(module)
        return send_to_device(args, self._slot.device), send_to_device(kwargs, self._slot.device)


def offload_in_turns(pipeline: Any, device: torch.device) -> None:
    """Hook every model of the pipeline, all in host memory, to move to the device when it is called."""
    slot = DeviceSlot(device)
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            add_hook_to_module(model, _TakesSlot(slot), append=True)


def ensure_on_device(model: torch.nn.Module) -> None:
    """Move an offloaded model to the device, for callers that call parts of it and not the whole."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)
