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

from inference.checkpoints.quantization import copied_to, is_quantized, num_bytes_of

# A module, and its parameter by name.
QuantizedWeight = tuple[torch.nn.Module, str, torch.nn.Parameter]


class HostedWeights:
    """Weights of models in host memory, which are copied to the device while the models are there.

    Weights are never written, so the originals stay valid, and leaving the device costs no copy. Quantized ones are of
    several tensors: their modules are given other parameters, where plain ones have other memory. Used by the engine's
    thread alone.
    """

    def __init__(self, models: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._models = models
        self._device = device
        self._in_host_memory: dict[torch.Tensor, torch.Tensor] = {}
        self._quantized: list[QuantizedWeight] = []

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that the weights take on the device."""
        quantized = {weight for model in self._models for _, _, weight in _quantized_weights(model)}
        return sum(tensor.nbytes for tensor in set(self._plain())) + sum(map(num_bytes_of, quantized))

    def enter(self) -> None:
        """Copy the weights to the device. `torch.OutOfMemoryError`, with none of them there, where they do not fit."""
        self._in_host_memory = {tensor: tensor.data for tensor in self._plain()}
        self._quantized = [one for model in self._models for one in _quantized_weights(model)]
        try:
            for tensor, host in self._in_host_memory.items():
                tensor.data = host.to(self._device, copy=True)
            for module, name, weight in self._quantized:
                setattr(module, name, copied_to(weight, self._device))
        except torch.OutOfMemoryError:
            self.leave()
            raise

    def leave(self) -> None:
        """Free the copies on the device."""
        for tensor, host in self._in_host_memory.items():
            tensor.data = host
        for module, name, weight in self._quantized:
            setattr(module, name, weight)
        self._in_host_memory, self._quantized = {}, []

    def _plain(self) -> Iterator[torch.Tensor]:
        for model in self._models:
            yield from (one for one in model.parameters() if not is_quantized(one))
            yield from model.buffers()


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


def _quantized_weights(model: torch.nn.Module) -> list[QuantizedWeight]:
    return [
        (module, name, weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if is_quantized(weight)
    ]


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
