"""Stable Diffusion 1.5, SDXL and Z-Image at full size, and tiny ones for a rehearsal: no file, only random weights.

Modules are built without memory for their parameters, which are then drawn on the device itself: six billion of them
take less than a second there, and would take minutes on the CPU.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.models.architectures import BUILDERS
from inference.models.base import Family
from inference.models.families.sdxl import StableDiffusionXL
from inference.models.families.stable_diffusion import StableDiffusion
from inference.models.families.z_image import ZImage

UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_LINEAR = (*UNET_ATTENTION, "ff.net.0.proj", "ff.net.2")
Z_IMAGE_ATTENTION = tuple(f"attention.{name}" for name in UNET_ATTENTION)
Z_IMAGE_LINEAR = (*Z_IMAGE_ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
BIAS_DEVIATION = 0.02
# Ranks 4 and 16, attention and all linear layers, and text-encoder layers where the family has them.
THREE_JOBS = (0, 5, 7)


@dataclass(frozen=True)
class BenchModel:
    """A model and what is drawn with it. `attention` and `linear`: the layers that adapters of either kind change.

    `baseline_jobs`: those of the ten that diffusers draws, counted up to ten. `engine_rounds`: of the set by the engine
    behind a first one, which is the figure where there are none: a time box holds no more of the larger models.
    """

    name: str
    family: type[StableDiffusion] | type[StableDiffusionXL] | type[ZImage]
    denoiser: str
    text_encoders: tuple[str, ...]
    pixels: int
    steps: int
    guidance: float
    largest_rank: int
    baseline_jobs: Sequence[int]
    engine_rounds: int
    num_joins: int
    attention: tuple[str, ...] = UNET_ATTENTION
    linear: tuple[str, ...] = UNET_LINEAR
    is_tiny: bool = False

    @property
    def rows_per_lane(self) -> int:
        return 2 if self.guidance > 1 else 1

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Build the diffusers pipeline with random weights, the same for the same device and sizes."""
        # It would tell of every adapter that leaves the text encoders alone.
        diffusers.utils.logging.set_verbosity_error()
        pipeline = self.build_without_memory()
        generator = torch.Generator(device).manual_seed(0)
        for part in _modules_of(pipeline).values():
            _fill(part.eval(), device=device, dtype=dtype, generator=generator)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def build_without_memory(self) -> Any:
        """Build the pipeline on the meta device, before its parameters are sampled."""
        with _NoMemory():
            return BUILDERS[self.name](is_tiny=self.is_tiny)

    def family_of(self, pipeline: Any, device: torch.device) -> Family:
        return self.family(pipeline, device=device)


def model_of(name: str, *, is_tiny: bool) -> BenchModel:
    """Stage 2's, 3's or 4's model: "sd15", "sdxl" or "z-image"."""
    model = MODELS[name]
    if not is_tiny:
        return model
    sizes = {"pixels": 64, "steps": 3, "largest_rank": 8, "engine_rounds": 1, "num_joins": 1, "is_tiny": True}
    return BenchModel(**{**{one: getattr(model, one) for one in model.__dataclass_fields__}, **sizes})


def shared_copy(pipeline: Any) -> Any:
    """Build a second pipeline on the same parameters: adapters that change its modules leave the first alone.

    Call it before an engine takes the first: hooks would be copied too.
    """
    memo: dict[int, Any] = {}
    for part in _modules_of(pipeline).values():
        memo |= {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    parts = {name: copy.deepcopy(part, memo) for name, part in _modules_of(pipeline).items()}
    return _rebuilt(pipeline, parts)


def cast_copy(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Copy the module with the same weights in another dtype."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in module.parameters()}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.to(dtype), requires_grad=False)
    return copied


def cast_pipeline(pipeline: Any, dtype: torch.dtype) -> Any:
    """Copy the pipeline with the same weights in another dtype."""
    return _rebuilt(pipeline, {name: cast_copy(part, dtype) for name, part in _modules_of(pipeline).items()})


def _rebuilt(pipeline: Any, parts: Mapping[str, torch.nn.Module]) -> Any:
    rebuilt = type(pipeline)(**{**_arguments(pipeline), **parts})
    rebuilt.set_progress_bar_config(disable=True)
    return rebuilt


def _arguments(pipeline: Any) -> dict[str, Any]:
    """Return the arguments that it was constructed with beside its components."""
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


MODELS = {
    "sd15": BenchModel("sd15", StableDiffusion, "unet", ("text_encoder",), 512, 20, 5.0, 128, range(10), 2, 3),
    "sdxl": BenchModel(
        "sdxl", StableDiffusionXL, "unet", ("text_encoder", "text_encoder_2"), 1024, 20, 5.0, 32, THREE_JOBS, 1, 1
    ),
    "z-image": BenchModel(
        "z-image", ZImage, "transformer", (), 1024, 8, 0.0, 32, THREE_JOBS, 0, 1, Z_IMAGE_ATTENTION, Z_IMAGE_LINEAR
    ),
}
