"""The bodies of the three webhooks as types, from which `json_schemas.py` writes the published schemas."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

from worker.errors import ErrorCode
from worker.messages.generation_id import MAX_NUMBER, TEXT
from worker.messages.schema import MAX_INT64, MAX_SEED

# Inline, as the published schema has no definitions.
_ErrorCode = Annotated[ErrorCode, WithJsonSchema({"enum": [code.value for code in ErrorCode], "type": "string"})]
_GenerationId = Annotated[
    Annotated[int, Field(ge=1, le=MAX_NUMBER)] | Annotated[str, Field(pattern=f"^{TEXT}$")],
    Field(description="The job's own, as it came: a number or text"),
]
_Seed = Annotated[int, Field(ge=0, le=MAX_INT64)]
_TYPE = Field(description="Where WEBHOOK_URL has one address take all webhooks")
_Url = Annotated[str, Field(min_length=1)]


class ProgressNumbers(TypedDict):
    """How far a job is."""

    current_step: Annotated[int, Field(ge=0, description="Denoise steps done")]
    total_steps: Annotated[int, Field(ge=1)]
    progress_percent: Annotated[
        int, Field(ge=0, lt=100, description="One of the milestones, 0, 25, 50, 75 and 90 unless configured otherwise")
    ]
    estimated_seconds: Annotated[int, Field(ge=0, description="Still to go, from measured step times; 0 where unknown")]


class ProgressBody(TypedDict):
    """Body of the progress webhook. Lossy: the newest replaces older ones, each at most once and in order, none behind
    the end."""

    type: NotRequired[Annotated[Literal["progress"], _TYPE]]
    generation_id: _GenerationId
    progress: ProgressNumbers
    preview_url: NotRequired[Annotated[str, Field(min_length=1, description="A small JPEG of how far the picture is")]]


class ImageMetadata(TypedDict):
    """What a picture was really drawn with."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="The job's, or the one derived from task_id")]
    steps: Annotated[int, Field(ge=1)]
    guidance_scale: Annotated[float, Field(ge=0)]
    guidance_rescale: NotRequired[Annotated[float, Field(gt=0, le=1, description="Where there was any")]]
    prompt_tags: Annotated[list[str], Field(description="The job's own, as they came")]
    width: Annotated[int, Field(ge=1, description="Of the stored picture, pixels")]
    height: Annotated[int, Field(ge=1, description="Of the stored picture, pixels")]
    model: Annotated[str, Field(description="The worker's model")]
    scheduler: str
    kind: NotRequired[Annotated[str, Field(description="The job's, where it is not text2image")]]
    style: NotRequired[Annotated[str, Field(description="The job's preset, where it named one")]]
    industry: NotRequired[Annotated[str, Field(description="The job's preset, where it named one")]]
    stages: NotRequired[
        Annotated[dict[str, str], Field(description="Of a product: each stage's picture, as a job may name it again")]
    ]
    ignored: NotRequired[
        Annotated[list[str], Field(description="Fields of the job's data that no worker knows, where there are any")]
    ]
    task_id: Annotated[str, Field(description="The job's, or the one that replaced what was no UUID")]
    seconds: Annotated[float, Field(ge=0, description="Time at work, without waiting in the queue")]
    result_urls: NotRequired[Annotated[list[_Url], Field(description="Of all pictures, where there are several")]]
    seeds: NotRequired[Annotated[list[_Seed], Field(description="Of all pictures, where there are several")]]


class CompleteBody(TypedDict):
    """Body of the complete webhook: the pictures are stored."""

    type: NotRequired[Annotated[Literal["complete"], _TYPE]]
    generation_id: _GenerationId
    result_url: Annotated[str, Field(min_length=1, description="Of the picture, of several the first")]
    metadata: ImageMetadata


class FailedBody(TypedDict):
    """Body of the failed webhook: there will be no picture."""

    type: NotRequired[Annotated[Literal["failed"], _TYPE]]
    generation_id: _GenerationId
    error_message: Annotated[str, Field(description="One sentence for people")]
    error_code: _ErrorCode
    retry_count: Annotated[int, Field(ge=0, description="Tries beyond the first")]
