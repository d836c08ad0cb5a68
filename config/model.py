"""Settings of the engine: model, device, batch size, adapters, ControlNets, previews."""

import os
import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource

from config.section import Section, split_commas
from config.visible_gpus import visible_gpu

DEFAULT_MODEL_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class ModelSettings(Section):
    """The resident model and how it runs."""

    model_id: str = Field(
        DEFAULT_MODEL_ID,
        validation_alias="MODEL_ID",
        min_length=1,
        description="Folder, hub id or single `.safetensors` file of the model",
    )
    config_source: str | None = Field(
        None,
        validation_alias="MODEL_CONFIG",
        description="Folder or hub id of what a single file lacks: configs, tokenizers; unset asks the hub",
    )
    vae_id: str | None = Field(
        None,
        validation_alias="VAE_ID",
        description="Folder, hub id or single `.safetensors` file of a VAE in place of the model's own",
    )
    cuda_visible_devices: str | None = Field(
        None,
        validation_alias="CUDA_VISIBLE_DEVICES",
        description="GPUs to choose from, numbered in PCI order; the first one draws unless DEVICE says which",
    )
    device: str = Field(
        "auto",
        validation_alias="DEVICE",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `cuda` or `cuda:N`: N counts from 0, within CUDA_VISIBLE_DEVICES where that is set",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", validation_alias="DTYPE", description="`auto` is float32 on a CPU, bfloat16 or float16 on a GPU"
    )
    weights: Literal["auto", "fp8"] = Field(
        "auto",
        validation_alias="WEIGHTS",
        description="`fp8` keeps linear layers in 8 bits: half of Z-Image's memory, other pictures;"
        " `auto` has all in DTYPE",
    )
    compile: Literal["off", "blocks", "graphs"] = Field(
        "off",
        validation_alias="COMPILE",
        description="`blocks` compiles the denoiser's blocks before the first job: faster steps, minutes to start;"
        " `graphs` replays its forwards as CUDA graphs too",
    )
    max_concurrent_generations: int = Field(
        10, validation_alias="MAX_CONCURRENT_GENERATIONS", ge=1, le=256, description="Pictures denoised at once"
    )
    adapter_slots: int = Field(
        16, validation_alias="ADAPTER_SLOTS", ge=4, le=1024, description="Adapters kept in the model at once"
    )
    adapter_max_rank: int = Field(
        256,
        validation_alias="ADAPTER_MAX_RANK",
        ge=8,
        le=512,
        multiple_of=8,
        description="Highest rank of an adapter",
    )
    adapter_memory_gb: float | None = Field(
        None,
        validation_alias="ADAPTER_MEMORY_GB",
        gt=0,
        description="Memory the adapters may take on the device, GB; unset is a quarter of what the weights leave free",
    )
    inference_steps: int | None = Field(
        None,
        validation_alias="INFERENCE_STEPS",
        ge=1,
        le=150,
        description="Denoise steps where a job names none; unset is 50, for Z-Image 8, for FLUX.1 28 (schnell 4), "
        "for FLUX.2 klein 50 (distilled 4)",
    )
    guidance_scale: float | None = Field(
        None,
        validation_alias="GUIDANCE_SCALE",
        ge=0,
        le=50,
        description="Guidance where a job names none; unset is 7.5, for Z-Image 0, for FLUX.1 3.5 (schnell 0), "
        "for FLUX.2 klein 4 (distilled 1)",
    )
    guidance_rescale: float = Field(
        0.0,
        validation_alias="GUIDANCE_RESCALE",
        ge=0,
        le=1,
        description="Rescaling of guidance where a job names none, for Stable Diffusion and SDXL; 0 is none",
    )
    controlnets: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        validation_alias="CONTROLNETS",
        description="ControlNets that jobs may name, comma-separated: `name=folder` or `name=hub id`",
    )
    controlnet_memory_gb: float = Field(
        4.0,
        validation_alias="CONTROLNET_MEMORY_GB",
        gt=0,
        description="Memory the resident ControlNets are kept under, GB; the least recently used goes first",
    )
    preview_every: int = Field(
        0, validation_alias="PREVIEW_EVERY", ge=0, le=150, description="Steps between two previews; 0 makes none"
    )
    safety_checker: bool = Field(
        False,
        validation_alias="SAFETY_CHECKER",
        description="`True` fails jobs whose pictures the checkpoint's own safety checker flags",
    )

    _split = field_validator("controlnets", mode="before")(split_commas)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read an empty CUDA_VISIBLE_DEVICES of the environment as CUDA does, which hides every GPU for it."""
        name = "CUDA_VISIBLE_DEVICES"
        hidden = {name: ""} if os.environ.get(name) == "" else {}
        empty = InitSettingsSource(settings_cls, hidden)
        return init_settings, env_settings, empty, dotenv_settings, file_secret_settings

    @field_validator("device")
    @classmethod
    def _is_visible(cls, device: str, found: ValidationInfo) -> str:
        visible_gpu(device, found.data.get("cuda_visible_devices"))
        return device

    @field_validator("controlnets")
    @classmethod
    def _are_named(cls, controlnets: tuple[str, ...]) -> tuple[str, ...]:
        names = [one.partition("=")[0] for one in controlnets]
        if not all(re.fullmatch(r"[\w.-]{1,100}=.+", one) for one in controlnets) or len(set(names)) < len(names):
            raise ValueError("must be name=folder or name=owner/hub-id, comma-separated, each name once")
        return controlnets

    @field_validator("safety_checker")
    @classmethod
    def _goes_without_previews(cls, is_on: bool, found: ValidationInfo) -> bool:
        if is_on and found.data.get("preview_every"):
            raise ValueError("cannot be on with PREVIEW_EVERY: a preview is stored before the picture can be checked")
        return is_on

    @property
    def visible_gpu(self) -> str | None:
        """The GPU that the engine uses, see `config.visible_gpus`."""
        return visible_gpu(self.device, self.cuda_visible_devices)

    @property
    def adapter_max_bytes(self) -> int | None:
        return None if self.adapter_memory_gb is None else int(self.adapter_memory_gb * 1e9)

    @property
    def controlnet_max_bytes(self) -> int:
        return int(self.controlnet_memory_gb * 1e9)

    @property
    def controlnet_sources(self) -> dict[str, str]:
        """Folder or hub id of each ControlNet by its name."""
        pairs = (one.partition("=") for one in self.controlnets)
        return {name: source for name, _, source in pairs}
