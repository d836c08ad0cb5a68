"""The fields of a generation message's `data`, with their limits: both dialects side by side.

Descriptions and `json_schema_extra` go into the published schema (`json_schemas.py`). The latter's rules are checked by
`decoder.py` and not here, because they have a sentence or a code of their own.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from watermark.geometry import Position
from watermark.resizing import Fit
from watermark.signature import Size
from worker.messages.job import Kind, Preprocess

MAX_PROMPT_CHARS = 4000
MAX_LOCATION_CHARS = 2048
MAX_ADAPTERS = 4
MAX_REFERENCES = 4
MAX_IMAGES = 8
MAX_STEPS = 150
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_OVERLAYS = 8
MAX_OVERLAY_CHARS = 300
MAX_INT64 = 2**63 - 1
MAX_SEED = MAX_INT64
# Tags are only echoed: the limit stops a publisher that loops.
MAX_TAGS = 1000
# "Any seed" in most tools: it counts as not given.
ANY_SEED = -1
SEED_TEXT = r"(-1|[0-9]{1,19})(\.0)?"

# JSON Schema searches and does not match: anchored patterns mean the same in Python and in JavaScript.
ASPECT = r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})"
NO_NUL = {"pattern": r"^[^\u0000]*$"}
NO_NUL_NOT_BLANK = {"pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"}
COLOUR_OR_AUTO = r"^(auto|#[0-9A-Fa-f]{6})$"

_Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
_Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE)]
_Guidance = Annotated[float, Field(ge=0, le=50)]
_Scale = Annotated[float, Field(ge=-4, le=4)]
_Location = Annotated[str, Field(max_length=MAX_LOCATION_CHARS)]
_Text = Annotated[str, Field(max_length=100, json_schema_extra=NO_NUL)]
_Tag = Annotated[str, Field(max_length=200, json_schema_extra=NO_NUL)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
# The fraction of the steps taken: 0 would return the reference itself.
_Strength = Annotated[float, Field(gt=0, le=1)]
_IMAGE = "PNG, JPEG, WebP, GIF, BMP or TIFF; named like `lora_path`"
_Image = Annotated[_Location, Field(description=_IMAGE)]
_ImageNotEmpty = Annotated[_Location, Field(description=_IMAGE, json_schema_extra={"minLength": 1})]
_ColourOrAuto = Annotated[str, Field(pattern=COLOUR_OR_AUTO)]
_PositionOrAuto = Annotated[str, Field(pattern=f"^(auto|{'|'.join(Position)})$")]


def seed_given(value: Any) -> Any:
    """Normalise a seed: text and 42.0 to the whole number, -1 to None. Anything else stays as it is.

    64-bit numbers travel as text where JavaScript reads them, and as floats where a table with gaps held them.
    """
    if isinstance(value, str) and re.fullmatch(SEED_TEXT, value):
        value = int(value.removesuffix(".0"))
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    # Not by == alone: True equals 1.
    return None if type(value) is int and value == ANY_SEED else value


_Seed = Annotated[
    Annotated[int, Field(ge=0, le=MAX_SEED)] | None,
    BeforeValidator(seed_given),
    Field(json_schema_extra={"type": ["integer", "string", "null"], "minimum": ANY_SEED, "pattern": f"^{SEED_TEXT}$"}),
]


class _Wire(BaseModel):
    # Strict: "50" is no number and true is no 1. Unknown fields are ignored: backends add fields before we do.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, fields: Any) -> Any:
        """Drop null and "", at every depth, and null among the items of a list."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: [item for item in value if item is not None] if isinstance(value, list) else value
            for name, value in fields.items()
            if value is not None and value != ""
        }


class WireLora(_Wire):
    """One of several adapters."""

    path: Annotated[_Location, Field(description="As `lora_path`, but not empty", json_schema_extra={"minLength": 1})]
    scale: _Scale = 1.0


class WireParameters(_Wire):
    """The documented dialect: what is set here wins over the flat fields."""

    width: _Side | None = None
    height: _Side | None = None
    steps: _Steps | None = None
    cfg_scale: _Guidance | None = None
    seed: _Seed = None
    scheduler: Annotated[str, Field(max_length=100)] | None = None
    cfg_normalization: Annotated[float, Field(ge=0, le=10)] | None = Field(default=None, description="Z-Image's own")
    cfg_truncation: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="Z-Image's own")
    true_cfg_scale: Annotated[float, Field(ge=1, le=50)] | None = Field(
        default=None, description="FLUX.1's and Qwen-Image's own"
    )


class WireSignatureConfig(_Wire):
    """How the artist's signature is placed."""

    position: Position = Field(default=Position.BOTTOM_RIGHT, strict=False)
    size: Size = Field(default=Size.MEDIUM, strict=False, description="15, 25 or 35 % of the picture's width")
    opacity: Annotated[float, Field(ge=0, le=1)] = 0.7


class WireControl(_Wire):
    """A picture whose edges, pose or depth the drawing follows, by one of the worker's ControlNets."""

    image_path: _ImageNotEmpty
    model: Annotated[str, Field(min_length=1, max_length=100, description="One of the worker's CONTROLNETS")]
    scale: Annotated[float, Field(ge=0, le=2, description="How strongly it is followed")] = 1.0
    start: Annotated[float, Field(ge=0, lt=1, description="Fraction of the steps at which it begins")] = 0.0
    end: Annotated[float, Field(gt=0, le=1, description="Fraction of the steps at which it ends; behind start")] = 1.0
    preprocess: Preprocess = Field(
        default=Preprocess.NONE, strict=False, description="canny: the worker finds the picture's edges first"
    )


class WireReference(_Wire):
    """One of the pictures that an edit is made from."""

    image_path: _ImageNotEmpty


class WireLayout(_Wire):
    """Where the product stands on its background."""

    scale: Annotated[float, Field(gt=0, le=1, description="Part of the picture that it fills at most, each way")] = 0.6
    position: _PositionOrAuto = Field(default="auto", description="auto: in the middle of the background's calm side")


class WireProduct(_Wire):
    """A product on a generated background. Any stage's picture may be brought instead of made."""

    image_path: Annotated[_Image, Field(description="The product's picture, whose cut-out is made")] | None = None
    cutout_path: Annotated[_Image, Field(description="The product cut out: a picture with alpha")] | None = None
    background_image_path: Annotated[_Image, Field(description="The background, not drawn then")] | None = None
    composite_path: (
        Annotated[
            _Image, Field(description="The product on its background; goes with `cutout_path`, whose place it has")
        ]
        | None
    ) = None
    layout: WireLayout | None = None
    shadow: Annotated[_Fraction, Field(description="Opacity of the contact shadow")] = 0.5
    refine_strength: Annotated[
        float, Field(ge=0, le=0.6, description="Strength of the pass that blends the two; 0 leaves it out")
    ] = 0.0


class WireStroke(_Wire):
    """The outline of a headline's letters."""

    width: Annotated[float, Field(ge=0, le=0.2, description="Of the letters' size")] = 0.05
    color: _ColourOrAuto = "auto"


class WireBox(_Wire):
    """The panel behind a headline."""

    color: _ColourOrAuto = "auto"
    opacity: _Fraction = 0.6


class WireTextOverlay(_Wire):
    """A headline on the finished picture, under the signature."""

    text: Annotated[
        str, Field(description="Lines may be broken by \\n; others wrap", json_schema_extra=NO_NUL_NOT_BLANK)
    ] = Field(min_length=1, max_length=MAX_OVERLAY_CHARS)
    font: Annotated[_Text, Field(description="Family name, as `darkroom fonts` lists it")] | None = None
    size: Annotated[float, Field(gt=0, le=0.5)] | Literal["fit"] = Field(
        default="fit", description="Of the letters, as a fraction of the picture's height; fit: as large as is good"
    )
    color: Annotated[_ColourOrAuto, Field(description="auto: black or white, by contrast")] = "auto"
    stroke: WireStroke | None = None
    shadow: bool = False
    box: WireBox | None = None
    position: _PositionOrAuto = Field(default="auto", description="auto: the calmest region")


class WireData(_Wire):
    """`data` of a generation message; both dialects side by side."""

    prompt: str = Field(
        description="Plain Unicode, not only blanks",
        json_schema_extra={"minLength": 1, "maxLength": MAX_PROMPT_CHARS, **NO_NUL_NOT_BLANK},
    )
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARS, json_schema_extra=NO_NUL)] | None = None
    lora_path: _Location | None = Field(
        default=None,
        description="A .safetensors object or a PEFT folder: s3://bucket/key, gs://bucket/key, the store's https form, "
        "or a key of the default bucket, in an allowed bucket. With `loras` at most four in all",
    )
    lora_scale: _Scale | None = Field(default=None, description="1 where it is not given")
    loras: Annotated[list[WireLora], Field(max_length=MAX_ADAPTERS)] | None = Field(
        default=None, description="Several adapters, behind the one of `lora_path`"
    )
    aspect_ratio: Annotated[str, Field(json_schema_extra={"pattern": f"^({ASPECT})?$"})] | None = Field(
        default=None,
        description="Else a reference picture's, or 1:1; up to 4 to 1. 1:1, 2:2, 1:2 and 2:1 count in the model's base "
        "size",
    )
    seed: _Seed = Field(
        default=None, description="Derived from task_id where it is not given or -1: a repeat draws the same"
    )
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        default=None, description="Seeds in a row; else 1"
    )
    num_inference_steps: _Steps | None = Field(default=None, description="The worker's default where it is not given")
    guidance_scale: _Guidance | None = Field(default=None, description="The worker's default where it is not given")
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="How far a guided step is brought back to the prompt's own contrast; not for Z-Image. The worker's "
        "default where it is not given",
    )
    width: _Side | None = Field(
        default=None, description="Pixels, together with height; rounded to the model's multiple"
    )
    height: _Side | None = None
    scheduler: _Text | None = Field(default=None, description="One of the model's family")
    model: _Text | None = Field(default=None, description="One of the worker's MODELS; else its default model")
    parameters: WireParameters | None = None
    signature_path: _Location | None = Field(default=None, description=_IMAGE)
    artist_name: _Text | None = Field(default=None, description="Written where there is no signature_path")
    signature_config: WireSignatureConfig | None = None
    kind: Kind | None = Field(default=None, strict=False, description="What sort of picture this is; else text2image")
    init_image_path: _Image | None = Field(
        default=None, description="image2image, inpaint: the picture to begin from; PNG, JPEG, WebP, GIF, BMP or TIFF"
    )
    mask_path: _Image | None = Field(default=None, description="inpaint: white is repainted; fitted like the picture")
    strength: _Strength | None = Field(
        default=None, description="How far from the init image; 0.8 for image2image, 1 for inpaint where not given"
    )
    fit: Fit | None = Field(
        default=None, strict=False, description="How reference pictures come to the picture's size; else cover"
    )
    control: WireControl | None = None
    product: WireProduct | None = None
    references: Annotated[list[WireReference], Field(max_length=MAX_REFERENCES)] | None = Field(
        default=None, description="edit: the pictures that the prompt is about, in its order; the first sets the ratio"
    )
    text_overlay: WireTextOverlay | Annotated[list[WireTextOverlay], Field(max_length=MAX_OVERLAYS)] | None = Field(
        default=None, description="One headline or several"
    )
    style: _Text | None = Field(default=None, description="A preset of the worker, like anime")
    industry: _Text | None = Field(default=None, description="A preset of the worker, like cafe")
    prompt_tags: Annotated[list[_Tag], Field(max_length=MAX_TAGS)] | None = Field(
        default=None, description="Told back with the picture"
    )
