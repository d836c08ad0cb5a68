"""Load Z-Image from one file: the transformer alone, or a checkpoint as ComfyUI saves it, with float8 weights too.

What the file lacks comes from MODEL_CONFIG. The names are those of `comfy/supported_models.py`, the scales those of its
QUANTIZATION.md.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from transformers import AutoConfig, Qwen3Model

from inference.checkpoints.single_files.layouts import SCALES, Z_IMAGE, Z_IMAGE_PREFIXES, split
from inference.errors import EngineStartFailed

# Its configs, tokenizer and scheduler are those of every Z-Image that the hub has.
DEFAULT_CONFIG = "Tongyi-MAI/Z-Image-Turbo"
# Beside quantized weights, and of no use where these are turned back.
EXTRAS = (".weight_scale_2", ".input_scale", ".scale_input", ".comfy_quant", "scaled_fp8")

Tensors = dict[str, torch.Tensor]


def load_z_image_file(path: Path, config: str | None, dtype: torch.dtype, variant: str | None) -> ZImagePipeline:
    """Load the file on the CPU. `config`: folder or hub id of the rest, and `variant` of its weight files.

    EngineStartFailed where weights are quantized to less than float8.
    """
    config = config or DEFAULT_CONFIG
    parts = split(safetensors.torch.load_file(path), Z_IMAGE)
    loaders = {"text_encoder": _text_encoder, "transformer": _transformer, "vae": _vae}
    loaded = {
        component: loaders[component](_unscaled(tensors, path, dtype), config, dtype)
        for component, tensors in parts.items()
        if tensors
    }
    # The components that are given are neither looked for nor downloaded.
    pipeline: ZImagePipeline = ZImagePipeline.from_pretrained(
        config, **loaded, dtype=dtype, use_safetensors=True, variant=variant
    )
    return pipeline


def _transformer(tensors: Tensors, config: str, dtype: torch.dtype) -> Any:
    return ZImageTransformer2DModel.from_single_file(tensors, config=config, subfolder="transformer", dtype=dtype)


def _vae(tensors: Tensors, config: str, dtype: torch.dtype) -> Any:
    return AutoencoderKL.from_single_file(tensors, config=config, subfolder="vae", dtype=dtype)


def _text_encoder(tensors: Tensors, config: str, dtype: torch.dtype) -> Any:
    # ComfyUI's is the language model, of which Z-Image reads the hidden states alone.
    names = {name: name.removeprefix(Z_IMAGE_PREFIXES["text_encoder"]).removeprefix("model.") for name in tensors}
    weights = {names[name]: tensor.to(dtype) for name, tensor in tensors.items() if names[name] != "lm_head.weight"}
    settings = AutoConfig.from_pretrained(config, subfolder="text_encoder")
    return Qwen3Model.from_pretrained(None, config=settings, state_dict=weights, dtype=dtype)


def _unscaled(tensors: Tensors, path: Path, dtype: torch.dtype) -> Tensors:
    """Return the weights without their scales. Those with one are multiplied by it, in fp32, and come in `dtype`."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith((*SCALES, *EXTRAS)):
            continue
        if not tensor.is_floating_point():
            raise EngineStartFailed(
                f"{path}: {name} is quantized to {tensor.dtype}; this version reads float8, 16 and 32 bits"
            )
        layer = name.removesuffix(".weight")
        scale = next((tensors[layer + ending] for ending in SCALES if layer + ending in tensors), None)
        weights[name] = tensor if scale is None else _times(tensor, scale, f"{path}: {name}").to(dtype)
    return weights


def _times(weight: torch.Tensor, scale: torch.Tensor, subject: str) -> torch.Tensor:
    """Return the weight times its one scale, or times one for each of its rows."""
    if scale.numel() not in (1, len(weight)):
        raise EngineStartFailed(
            f"{subject} has {scale.numel()} scales; this version reads one for a layer or for each of its rows"
        )
    return weight.float() * scale.float().view(-1, *[1] * (weight.ndim - 1))
