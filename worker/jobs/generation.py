"""Generation: how the images of a job are made, by the job's kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from inference.request import GenerationRequest
from worker.jobs.engine_client import EngineClient, GeneratedImages
from worker.jobs.inputs.fetcher import JobInputs
from worker.jobs.inputs.references import References
from worker.jobs.runs import Run
from worker.messages.job import Job, Kind
from worker.progress.reporter import JobProgress


class Generation(Protocol):
    """The images of one job in the making; its job's thread owns it."""

    @property
    def references(self) -> References:
        """Images that the request is made from, and that set its size."""

    @property
    def stages(self) -> Mapping[str, str]:
        """URI of each intermediate image that the job's backend can correct and send again."""

    def generate(self, run: Run, request: GenerationRequest, track: JobProgress) -> GeneratedImages:
        """Make the images; blocks. Raises what the engine and the store raise, and what ends a job early."""

    def save_headline(self, image: Image.Image) -> None:
        """Store the image with headlines and without signature, where it is an intermediate image."""

    def save_final(self, content: bytes) -> None:
        """Store the finished image's file, where it is kept with the intermediate ones."""


# Starts a job's generation; what the job brings for its kind alone is fetched then.
StartGeneration = Callable[[Job, JobInputs], Generation]
Generations = Mapping[Kind, StartGeneration]


@dataclass(frozen=True, slots=True)
class PlainGeneration:
    """One engine request makes all images; nothing is kept between."""

    engine_client: EngineClient
    references: References
    stages: Mapping[str, str] = field(default_factory=dict)

    def generate(self, run: Run, request: GenerationRequest, track: JobProgress) -> GeneratedImages:
        """Have the engine generate the images."""
        return GeneratedImages(self.engine_client.generate(run, request, track))

    def save_headline(self, image: Image.Image) -> None:
        """Store nothing."""

    def save_final(self, content: bytes) -> None:
        """Store nothing."""


def generations(engine_client: EngineClient, product: StartGeneration) -> Generations:
    """Return how each kind's generation is started: `product` starts a product's."""

    def start_plain(_job: Job, inputs: JobInputs) -> Generation:
        return PlainGeneration(engine_client, inputs.references)

    return dict.fromkeys(Kind, start_plain) | {Kind.PRODUCT: product}
