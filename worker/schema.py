"""What `data` of a generation message may hold, field by field, with its limits: both dialects side by side."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from watermark.signature import Position, Size

MAX_PROMPT_CHARS = 4000
MAX_LOCATION_CHARS = 2048
MAX_ADAPTERS = 4
MAX_IMAGES = 8
MAX_STEPS = 150
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_INT64 = 2**63 - 1
# Seeds run to seed + num_images - 1 and must stay what a torch.Generator takes.
MAX_SEED = MAX_INT64 - MAX_IMAGES

_Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
_Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE)]
_Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
_Guidance = Annotated[float, Field(ge=0, le=50)]
_Scale = Annotated[float, Field(ge=-4, le=4)]
_Location = Annotated[str, Field(max_length=MAX_LOCATION_CHARS)]
_Name = Annotated[str, Field(max_length=100)]
_Tag = Annotated[str, Field(max_length=200)]


class _Wire(BaseModel):
    # Strict: "50" is no number and true is no 1. Unknown fields are ignored: backends grow theirs before we do.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class WireLora(_Wire):
    """One of several adapters."""

    path: _Location
    scale: _Scale = 1.0


class WireParameters(_Wire):
    """The documented dialect; what is set here wins over the flat fields."""

    width: _Side | None = None
    height: _Side | None = None
    steps: _Steps | None = None
    cfg_scale: _Guidance | None = None
    seed: _Seed | None = None
    scheduler: _Name | None = None
    cfg_normalization: Annotated[float, Field(ge=0, le=10)] | None = None
    cfg_truncation: Annotated[float, Field(ge=0, le=1)] | None = None


class WireSignatureConfig(_Wire):
    """How the artist's signature is placed."""

    position: Position = Field(default=Position.BOTTOM_RIGHT, strict=False)
    size: Size = Field(default=Size.MEDIUM, strict=False)
    opacity: Annotated[float, Field(ge=0, le=1)] = 0.7


class WireData(_Wire):
    """`data` of a generation message; both dialects side by side."""

    prompt: str
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS)] | None = None
    lora_path: _Location | None = None
    lora_scale: _Scale | None = None
    loras: Annotated[list[WireLora], Field(max_length=MAX_ADAPTERS)] | None = None
    aspect_ratio: str | None = None
    seed: _Seed | None = None
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    num_inference_steps: _Steps | None = None
    guidance_scale: _Guidance | None = None
    width: _Side | None = None
    height: _Side | None = None
    scheduler: _Name | None = None
    parameters: WireParameters | None = None
    signature_path: _Location | None = None
    artist_name: _Name | None = None
    signature_config: WireSignatureConfig | None = None
    prompt_tags: Annotated[list[_Tag], Field(max_length=100)] | None = None
