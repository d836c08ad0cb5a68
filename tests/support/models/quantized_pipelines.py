"""Plain diffusers pipelines whose denoiser diffusers itself has quantized, with its own default settings but the kept
layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, replace_with_bnb_linear
from torchao.quantization import Float8WeightOnlyConfig

from tests.support.models.tiny_models import load_pipe


def quantized_by_diffusers(checkpoint: Path, storage: str, component: str, weights: Sequence[str]) -> Any:
    """Load the checkpoint in fp32 with those `weights` of the component quantized, as "fp8" or "nf4"."""
    pipe = load_pipe(checkpoint, torch.float32)
    model = getattr(pipe, component)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = [name for name in linear if f"{name}.weight" not in weights]
    if storage == "nf4":
        _quantize_to_nf4(model, kept)
        return pipe
    config = TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=kept)
    mapping = PipelineQuantizationConfig(quant_mapping={component: config})
    return DiffusionPipeline.from_pretrained(checkpoint, quantization_config=mapping, dtype=torch.float32)


def _quantize_to_nf4(model: Any, kept: Sequence[str]) -> None:
    """Quantize as a load would: that asks for a GPU, and its parts do not."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=kept
    )
    quantizer = BnB4BitDiffusersQuantizer(config, pre_quantized=False)
    state = model.state_dict()
    before = dict(model.named_modules())
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    for layer, module in model.named_modules():
        if module is not before[layer]:
            for name, _ in module.named_parameters():
                key = f"{layer}.{name}"
                quantizer.create_quantized_param(model, state[key], key, torch.device("cpu"), state)
    model.is_loaded_in_4bit = True
