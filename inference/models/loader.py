"""Load the family of the checkpoint in the settings onto the device."""

import torch

from config.model import ModelSettings
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.memory_plan import Placement, free_bytes, most_adapter_bytes, place, plan_and_warn
from inference.checkpoints.pipeline import download, load_pipeline, weight_bytes
from inference.checkpoints.quantization import quantize
from inference.controlnet.files import find_controlnets
from inference.controlnet.loader import ControlNets
from inference.errors import EngineStartFailed
from inference.lora.adapter_memory import AdapterMemory
from inference.models.base import Family
from inference.models.families.chroma import Chroma
from inference.models.families.flux import Flux
from inference.models.families.flux_2 import Flux2Klein
from inference.models.families.krea2 import Krea2
from inference.models.families.qwen_image import QwenImage
from inference.models.families.sdxl import StableDiffusionXL
from inference.models.families.stable_diffusion import StableDiffusion
from inference.models.families.unet import UNetFamily
from inference.models.families.z_image import ZImage

AnyFamily = (
    type[StableDiffusion]
    | type[StableDiffusionXL]
    | type[ZImage]
    | type[Flux]
    | type[Flux2Klein]
    | type[Chroma]
    | type[QwenImage]
    | type[Krea2]
)

FAMILIES: dict[str, AnyFamily] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "ZImagePipeline": ZImage,
    "FluxPipeline": Flux,
    "ChromaPipeline": Chroma,
    "QwenImagePipeline": QwenImage,
    "Flux2KleinPipeline": Flux2Klein,
    "Krea2Pipeline": Krea2,
}


def load_family(
    settings: ModelSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    free: int | None = None,
    num_models: int = 1,
    is_hosted: bool = False,
) -> Family:
    """Load the model of the settings, resident on `device` or, where it does not fit, offloaded in turns.

    `free` bytes of the device are for it (None: those free now), of which one of `num_models` has its share for
    adapters. With `is_hosted` it stays in host memory, and fits the device as a whole. `EngineStartFailed` where it
    cannot be run.
    """
    found = identify(
        settings.model_id, settings.config_source, has_checker=settings.safety_checker, vae_id=settings.vae_id
    )
    if settings.guidance_rescale and not issubclass(FAMILIES[found.pipeline_class], UNetFamily):
        reason = f"GUIDANCE_RESCALE is for Stable Diffusion and SDXL, and MODEL_ID {settings.model_id!r} is neither"
        raise EngineStartFailed(f"{reason}: unset it")
    checkpoint = download(found)
    needed = weight_bytes(checkpoint, dtype.itemsize, settings.weights)
    assert needed is not None, "a downloaded checkpoint has its files"  # noqa: S101
    files = find_controlnets(settings.controlnet_sources)
    controlnets = ControlNets(files, max_bytes=settings.controlnet_max_bytes, device=device, dtype=dtype)
    free = (free_bytes(device) if free is None else free) - controlnets.most_bytes
    chosen = settings.adapter_max_bytes
    placement = plan_and_warn(device.type, needed, free, chosen)
    if is_hosted and placement is Placement.OFFLOADED:
        raise EngineStartFailed(
            f"MODEL_ID {settings.model_id!r} does not fit the GPU as a whole, and with MODELS whole models take turns:"
            " set WEIGHTS=nf4, name a smaller one, or use a larger GPU"
        )
    memory = AdapterMemory(
        settings.adapter_slots,
        settings.adapter_max_rank,
        most_adapter_bytes(chosen, needed, free, placement) // num_models,
        is_chosen=chosen is not None,
    )
    pipeline = load_pipeline(checkpoint, dtype)
    try:
        if settings.weights != "auto":
            quantize(pipeline, settings.weights, device)
        if not is_hosted:
            place(pipeline, device, placement)
        family = FAMILIES[checkpoint.pipeline_class](pipeline, device=device, memory=memory)
    except torch.OutOfMemoryError as error:
        raise EngineStartFailed(f"MODEL_ID {settings.model_id!r} does not fit the GPU's memory: {error}") from error
    family.public_name = checkpoint.public_name
    family.set_controlnets(controlnets)
    return family
