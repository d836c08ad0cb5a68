"""Stable Diffusion 1.5, SDXL and Z-Image at full size, and tiny ones for a rehearsal: no file, only random weights.

Modules are built without memory for their parameters, which are then drawn on the device itself: six billion of them
take less than a second there, and would take minutes on the CPU.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3Model

from inference.families.family import Family
from inference.families.sdxl import StableDiffusionXL
from inference.families.stable_diffusion import StableDiffusion
from inference.families.z_image import ZImage
from tests.tiny_models import BETAS, byte_tokenizer, chat_tokenizer

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_LINEAR = (*UNET_ATTENTION, "ff.net.0.proj", "ff.net.2")
Z_IMAGE_ATTENTION = tuple(f"attention.{name}" for name in UNET_ATTENTION)
Z_IMAGE_LINEAR = (*Z_IMAGE_ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
BIAS_DEVIATION = 0.02


@dataclass(frozen=True)
class BenchModel:
    """A model and what is drawn with it. `attention` and `linear`: the layers that adapters of either kind change."""

    name: str
    family: type[StableDiffusion] | type[StableDiffusionXL] | type[ZImage]
    denoiser: str
    text_encoders: tuple[str, ...]
    pixels: int
    steps: int
    guidance: float
    largest_rank: int
    attention: tuple[str, ...] = UNET_ATTENTION
    linear: tuple[str, ...] = UNET_LINEAR
    is_tiny: bool = False

    @property
    def rows_per_lane(self) -> int:
        return 2 if self.guidance > 1 else 1

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The diffusers pipeline with random weights, the same for the same device and sizes."""
        pipeline = self.build_without_memory()
        generator = torch.Generator(device).manual_seed(0)
        for part in _modules_of(pipeline).values():
            _fill(part.eval(), device=device, dtype=dtype, generator=generator)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def build_without_memory(self) -> Any:
        """The pipeline before its parameters are drawn: on the meta device."""
        with _NoMemory():
            return BUILDERS[self.name](is_tiny=self.is_tiny)

    def family_of(self, pipeline: Any, device: torch.device) -> Family:
        return self.family(pipeline, device=device)


def model_of(name: str, *, is_tiny: bool) -> BenchModel:
    """Stage 2's, 3's or 4's model: "sd15", "sdxl" or "z-image"."""
    model = MODELS[name]
    if not is_tiny:
        return model
    sizes = {"pixels": 64, "steps": 3, "largest_rank": 8, "is_tiny": True}
    return BenchModel(**{**{one: getattr(model, one) for one in model.__dataclass_fields__}, **sizes})


def shared_copy(pipeline: Any) -> Any:
    """A second pipeline on the same parameters: adapters that change its modules leave the first alone.

    To be made before the first is an engine's: hooks would be copied too.
    """
    memo: dict[int, Any] = {}
    for part in _modules_of(pipeline).values():
        memo |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    parts = {name: copy.deepcopy(part, memo) for name, part in _modules_of(pipeline).items()}
    return _rebuilt(pipeline, parts)


def cast_copy(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The module with the same weights in another dtype."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in module.parameters()}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.to(dtype), requires_grad=False)
    return copied


def cast_pipeline(pipeline: Any, dtype: torch.dtype) -> Any:
    """A pipeline with the same weights in another dtype."""
    return _rebuilt(pipeline, {name: cast_copy(part, dtype) for name, part in _modules_of(pipeline).items()})


def _rebuilt(pipeline: Any, parts: Mapping[str, torch.nn.Module]) -> Any:
    rebuilt = type(pipeline)(**{**_arguments(pipeline), **parts})
    rebuilt.set_progress_bar_config(disable=True)
    return rebuilt


def _arguments(pipeline: Any) -> dict[str, Any]:
    """What it was constructed with beside its components."""
    known = ("requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker")
    settings = {name: pipeline.config[name] for name in known if name in pipeline.config}
    components = {name: part for name, part in pipeline.components.items() if part is not None}
    absent = {name: None for name in ("safety_checker", "feature_extractor") if name in pipeline.components}
    return {**absent, **components, **settings}


def _modules_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


class _NoMemory(TorchFunctionMode):
    """Have what modules allocate be without memory; what they compute, as position ids, rotary caches, is computed."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function in (torch.empty, torch.zeros, torch.ones) and given.get("device") is None:
            given["device"] = "meta"
        return function(*args, **given)


def _fill(module: torch.nn.Module, *, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give every parameter memory and values: zeros would hide errors, and run faster than weights do."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                weight = torch.empty(parameter.shape, device=device, dtype=dtype)
                _draw(weight, is_scale=name == "weight", generator=generator)
                part._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"the buffer {name} of {type(part).__name__} has no values"
                part._buffers[name] = buffer.to(device)


def _draw(weight: torch.Tensor, *, is_scale: bool, generator: torch.Generator) -> None:
    if weight.ndim > 1:
        weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    elif is_scale:
        weight.normal_(1, BIAS_DEVIATION, generator=generator)
    else:
        weight.normal_(0, BIAS_DEVIATION, generator=generator)


def _sd15(*, is_tiny: bool) -> Any:
    """As runwayml's configs: UNet 860 M, text encoder 123 M, VAE 84 M parameters."""
    tokenizer = byte_tokenizer()
    full = {"sample_size": 64, "cross_attention_dim": 768}
    tiny = {"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, **_TINY_UNET}
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**(tiny if is_tiny else full)),
        text_encoder=CLIPTextModel(_clip(tokenizer, is_tiny=is_tiny, layers=12, heads=12, width=768)),
        tokenizer=tokenizer,
        vae=_vae(is_tiny=is_tiny, sample_size=512),
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(*, is_tiny: bool) -> Any:
    """As stabilityai's configs: UNet 2.6 B, text encoders 123 M and 695 M, VAE 84 M parameters."""
    tokenizer, tokenizer_2 = byte_tokenizer(), byte_tokenizer(pad_token="!")  # noqa: S106 - of text
    full = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    tiny = {
        **_TINY_UNET,
        "sample_size": 8,
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 2, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    second = _clip(tokenizer_2, is_tiny=is_tiny, layers=32, heads=20, width=1280, hidden_act="gelu")
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            **{**(tiny if is_tiny else full), **_SDXL_BLOCKS},
            use_linear_projection=True,
            addition_embed_type="text_time",
        ),
        text_encoder=CLIPTextModel(_clip(tokenizer, is_tiny=is_tiny, layers=12, heads=12, width=768)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        vae=_vae(is_tiny=is_tiny, sample_size=1024, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _z_image(*, is_tiny: bool) -> Any:
    """As Tongyi-MAI's configs: transformer 6.2 B, language model 4 B, VAE 84 M parameters."""
    tokenizer = chat_tokenizer()
    tiny_transformer = {
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1024, 128, 128],
    }
    full = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    tiny = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = (2, 1, 16) if is_tiny else (32, 8, 128)
    counts = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**(tiny_transformer if is_tiny else {})),
        text_encoder=Qwen3Model(
            Qwen3Config(
                **{**(tiny if is_tiny else full), **counts},
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        vae=_vae(
            is_tiny=is_tiny,
            sample_size=1024,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )


def _clip(tokenizer: Any, *, is_tiny: bool, layers: int, heads: int, width: int, hidden_act: str = "quick_gelu") -> Any:
    sizes = (2, 2, 32, len(tokenizer)) if is_tiny else (layers, heads, width, 49408)
    num_layers, num_heads, hidden, vocabulary = sizes
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(*, is_tiny: bool, sample_size: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16) if is_tiny else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if is_tiny else 2,
        norm_num_groups=4 if is_tiny else 32,
        sample_size=64 if is_tiny else sample_size,
        **config,
    )


_TINY_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
}
_SDXL_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
BUILDERS = {"sd15": _sd15, "sdxl": _sdxl, "z-image": _z_image}
MODELS = {
    "sd15": BenchModel("sd15", StableDiffusion, "unet", ("text_encoder",), 512, 20, 5.0, 128),
    "sdxl": BenchModel("sdxl", StableDiffusionXL, "unet", ("text_encoder", "text_encoder_2"), 1024, 20, 5.0, 32),
    "z-image": BenchModel(
        "z-image", ZImage, "transformer", (), 1024, 8, 0.0, 32, attention=Z_IMAGE_ATTENTION, linear=Z_IMAGE_LINEAR
    ),
}
