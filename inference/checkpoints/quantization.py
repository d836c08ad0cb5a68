"""Keep the weights of large layers in eight bits: float8 (e4m3) with a scale for each row, by torchao.

A layer's weight is turned back to the model's dtype for each product. Adapters are added as ever: the bank reads no
base weight.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from inference.checkpoints.weight_files import Shapes, count_parameters

if TYPE_CHECKING:
    import torch

Storage = Literal["auto", "fp8"]

DENOISERS = ("unet", "transformer")
# Text encoders from this many parameters on: the language models, and not CLIP.
MIN_ENCODER_PARAMETERS = 1_000_000_000
FLOAT8_BYTES, SCALE_BYTES = 1, 4
# Where a model's authors name no layers that have to stay as they are.
DEFAULT_KEPT = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
# In the names of a file's tensors: what is no layer's matrix, or one of those that stay.
KEPT_IN_FILES = re.compile(r"emb|norm|lm_head|^proj_(in|out)\.")


def quantize(pipeline: Any) -> None:
    """Quantize the linear layers of the denoiser and of large text encoders, in place."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_  # noqa: PLC0415 - where nobody asks, no seconds

    for component, model in pipeline.components.items():
        if hasattr(model, "parameters") and _is_quantized(component, sum(one.numel() for one in model.parameters())):
            quantize_(model, Float8WeightOnlyConfig(), partial(_is_large_layer, kept=kept_layers(model)))


def kept_layers(model: Any) -> Sequence[str]:
    """Return patterns of the names of layers that are kept: those in which the model's authors saw too much harm."""
    return getattr(model, "_skip_layerwise_casting_patterns", None) or DEFAULT_KEPT


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
        if len(shape) == 2 and name.endswith(".weight") and not KEPT_IN_FILES.search(name)
    ]
    num_quantized, num_rows = sum(rows * columns for rows, columns in matrices), sum(rows for rows, _ in matrices)
    return (num_parameters - num_quantized) * bytes_each + num_quantized * FLOAT8_BYTES + num_rows * SCALE_BYTES


def _is_quantized(component: str, num_parameters: int) -> bool:
    is_large_encoder = component.startswith("text_encoder") and num_parameters >= MIN_ENCODER_PARAMETERS
    return component in DENOISERS or is_large_encoder


def _is_large_layer(module: "torch.nn.Module", name: str, *, kept: Sequence[str]) -> bool:
    import torch  # noqa: PLC0415 - `darkroom check` counts without it

    return isinstance(module, torch.nn.Linear) and not any(re.search(pattern, name) for pattern in kept)
