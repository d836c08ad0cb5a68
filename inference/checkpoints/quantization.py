"""Keep the weights of large layers in eight or four bits: float8 (e4m3) with a scale for each row, by torchao, or NF4
with a scale for each block of 64, by bitsandbytes.

A layer's weight is turned back to the model's dtype for each product. Adapters are added as ever: the bank reads no
base weight.
"""

import ctypes
import math
import re
from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from inference.checkpoints.weight_files import Shapes, count_parameters

if TYPE_CHECKING:
    import torch

Storage = Literal["auto", "fp8", "nf4"]

DENOISERS = ("unet", "transformer")
# Text encoders from this many parameters on: the language models, and not CLIP.
MIN_ENCODER_PARAMETERS = 1_000_000_000
SCALE_BYTES = 4
# Parameters of one scale, next to each other in a row: a shorter row, or part of one, would share another's.
NF4_BLOCK = 64
# Where a model's authors name no layers that have to stay as they are.
DEFAULT_KEPT = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
# In the names of a file's tensors: what is no layer's matrix, or one of those that stay.
KEPT_IN_FILES = re.compile(r"emb|norm|lm_head|^shared\.|^proj_(in|out)\.")


def quantize(pipeline: Any, storage: Storage, device: "torch.device") -> None:
    """Quantize the linear layers of the denoiser and of large text encoders, in place.

    The models are in host memory, and stay there: each layer is on `device` while it is quantized, as a GPU takes less
    long.
    """
    change = _to_float8 if storage == "fp8" else _to_nf4
    for component, model in pipeline.components.items():
        if hasattr(model, "parameters") and _is_quantized(component, sum(one.numel() for one in model.parameters())):
            is_large_layer = partial(_is_large_layer, storage=storage, kept=kept_layers(model))
            for name in [name for name, module in model.named_modules() if is_large_layer(module, name)]:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, change(model.get_submodule(name), device))
                _return_freed_memory()


def kept_layers(model: Any) -> Sequence[str]:
    """Return patterns of the names of layers that are kept: those in which the model's authors saw too much harm."""
    return getattr(model, "_skip_layerwise_casting_patterns", None) or DEFAULT_KEPT


def is_quantized(weight: "torch.nn.Parameter") -> bool:
    """Return whether the weight is of one of the libraries' classes."""
    import torch  # noqa: PLC0415 - `darkroom check` counts without it

    return type(weight) is not torch.nn.Parameter


def copied_to(weight: Any, device: "torch.device") -> "torch.nn.Parameter":
    """Return a quantized weight on another device, and leave the one that is given where it is."""
    import torch  # noqa: PLC0415 - `darkroom check` counts without it

    # Neither library makes a parameter of a tensor of inference mode, in which models are called.
    with torch.inference_mode(mode=False):
        if not hasattr(weight, "quant_state"):
            return torch.nn.Parameter(weight.to(device), requires_grad=False)
        # Its scales would move with the copy, and not be copied.
        weight = copy(weight)
        weight.quant_state = copy(weight.quant_state)
        moved: torch.nn.Parameter = weight.to(device)
        return moved


def num_bytes_of(weight: Any) -> int:
    """Return what a quantized weight takes in memory, with its scales."""
    parts = (weight.data, weight.quant_state.absmax) if hasattr(weight, "quant_state") else (weight.qdata, weight.scale)
    return sum(part.nbytes for part in parts)


def bytes_of(component: str, shapes: Shapes, bytes_each: int, storage: Storage) -> int:
    """Return what the component's weights take in memory, at `bytes_each` a parameter that is not quantized.

    An estimate where they are: files of other layouts name the layers that are kept in other words.
    """
    num_parameters = count_parameters(shapes)
    if storage == "auto" or not _is_quantized(component, num_parameters):
        return num_parameters * bytes_each
    matrices = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not KEPT_IN_FILES.search(name) and _takes(storage, shape[1])
    ]
    num_quantized = sum(math.prod(shape) for shape in matrices)
    return (num_parameters - num_quantized) * bytes_each + sum(quantized_bytes(storage, *shape) for shape in matrices)


def quantized_bytes(storage: Storage, rows: int, columns: int) -> int:
    """Return what a quantized matrix takes in memory, with its scales."""
    if storage == "fp8":
        return rows * columns + rows * SCALE_BYTES
    return rows * columns // 2 + rows * columns // NF4_BLOCK * SCALE_BYTES


def _takes(storage: Storage, columns: int) -> bool:
    return storage == "fp8" or columns % NF4_BLOCK == 0


def _is_quantized(component: str, num_parameters: int) -> bool:
    is_large_encoder = component.startswith("text_encoder") and num_parameters >= MIN_ENCODER_PARAMETERS
    return component in DENOISERS or is_large_encoder


def _is_large_layer(module: "torch.nn.Module", name: str, *, storage: Storage, kept: Sequence[str]) -> bool:
    import torch  # noqa: PLC0415 - `darkroom check` counts without it

    if not isinstance(module, torch.nn.Linear) or any(re.search(pattern, name) for pattern in kept):
        return False
    return _takes(storage, module.in_features)


def _to_float8(layer: Any, device: "torch.device") -> Any:
    import torch  # noqa: PLC0415 - `darkroom check` counts without it
    from torchao.quantization import Float8WeightOnlyConfig, quantize_  # noqa: PLC0415 - where nobody asks, no seconds

    home = layer.weight.device
    # Or the whole weight, and what was computed of it, would be kept for a backward pass.
    with torch.no_grad():
        layer.to(device)
        quantize_(layer, Float8WeightOnlyConfig(), lambda *_: True)
        return layer.to(home)


def _to_nf4(layer: Any, device: "torch.device") -> Any:
    import torch  # noqa: PLC0415 - `darkroom check` counts without it
    from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: PLC0415 - where nobody asks, no seconds

    weight = layer.weight
    # As its dtype, which models ask for: of bytes T5 would make its activations bytes too.
    usual = {"compress_statistics": False, "quant_type": "nf4", "quant_storage": weight.dtype}
    with torch.device("meta"):
        made = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, weight.dtype, **usual)
    made.weight = Params4bit(weight.data, requires_grad=False, **usual).to(device).to(weight.device)
    made.bias = layer.bias
    # Or some processors would compute in bfloat16, whatever the dtype, on weights that are packed anew.
    made.support_avx512bf16_for_cpu = False
    return made.train(layer.training)


def _return_freed_memory() -> None:
    """Return what was computed on the way to the system: the C library keeps it between the weights, as much again as
    they took.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
