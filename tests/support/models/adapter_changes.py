"""What an adapter changes of a model's weights: by the layers that were read from its file, and by PEFT's own."""

from collections.abc import Mapping

import peft
import torch

from inference.lora.adapter import Adapter

Changes = dict[str, torch.Tensor]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


def changes_of(adapter: Adapter) -> Changes:
    """Return each layer's change of weight, by the layer's name."""
    return {name: product(layer.a.float(), layer.b.float()) for name, layer in adapter.layers.items()}


def changes_by_peft(models: Mapping[str, torch.nn.Module]) -> Changes:
    """Return the same of the one adapter that a library loaded into the models."""
    changes = {
        f"{model}.{name}": module.get_delta_weight(next(iter(module.lora_A))).detach()
        for model, root in models.items()
        for name, module in root.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    # PEFT also prepares layers of a similar name for which the file has nothing.
    return {name: change for name, change in changes.items() if change.any()}


def assert_same_changes(actual: Changes, expected: Changes) -> None:
    assert actual.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(actual[name], change, rtol=1e-5, atol=1e-5)
