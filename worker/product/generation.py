"""Product jobs as a `Generation`: the composer's images in a job's run, each stage kept in the store."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from PIL import Image

from inference.request import GenerationRequest, GenerationResult, ModelFacts
from worker.jobs.engine_client import EngineClient, GeneratedImages, ProgressSpan
from worker.jobs.inputs.fetcher import Fetcher, JobInputs
from worker.jobs.inputs.references import References, output_size
from worker.jobs.runs import Phase, Run
from worker.messages.job import Job
from worker.product.composer import ProductComposer
from worker.product.cutter import Cutter
from worker.product.inputs import ProductInputs, load_inputs
from worker.product.stage_store import ProductStage, StageStore
from worker.progress.reporter import JobProgress
from worker.results.image_store import ImageStore


@dataclass(frozen=True, slots=True)
class ProductGenerator:
    """Starts the generations of product jobs; one for all of them."""

    fetcher: Fetcher
    facts: Mapping[str, ModelFacts]
    engine_client: EngineClient
    store: ImageStore
    cutter: Cutter
    private_bucket: str

    def start(self, job: Job, _inputs: JobInputs) -> "ProductGeneration":
        """Fetch the images that the job brings, fitted to its size; blocks. Raises `JobFailed`."""
        assert job.product is not None, "a job of kind product has one"  # noqa: S101
        inputs = load_inputs(job.product, job.fit, self.fetcher.image)
        inputs = inputs.at(output_size(job, self.facts[job.model], inputs.proportions))
        stage_store = StageStore(self.store, self.private_bucket, job)
        return ProductGeneration(self.engine_client, self.cutter, inputs, stage_store)


@dataclass(frozen=True, slots=True)
class ProductGeneration:
    """The `Generation` of one product job."""

    engine_client: EngineClient
    cutter: Cutter
    inputs: ProductInputs
    stage_store: StageStore

    @property
    def references(self) -> References:
        """The size alone: the composer makes its requests' images."""
        return self.inputs.references

    @property
    def stages(self) -> Mapping[str, str]:
        """URI of each stage's image, sent by the job or kept here."""
        return self.stage_store.uris

    def generate(self, run: Run, request: GenerationRequest, track: JobProgress) -> GeneratedImages:
        """Compose the product's image in this run."""
        self.inputs.list_in(self.stage_store)
        context = _RunContext(self.engine_client, run, track)
        scheduler = request.scheduler or ""
        return ProductComposer(context, self.stage_store, self.cutter, request, self.inputs, scheduler).generate()

    def save_headline(self, image: Image.Image) -> None:
        """Store the stage with headlines."""
        self.stage_store.save(ProductStage.HEADLINE, image)

    def save_final(self, content: bytes) -> None:
        """Store the last stage."""
        self.stage_store.save_png(ProductStage.FINAL, content)


@dataclass(frozen=True, slots=True)
class _RunContext:
    """`GenerationContext` of a job's run."""

    engine_client: EngineClient
    run: Run
    track: JobProgress

    def generate(self, request: GenerationRequest, span: ProgressSpan) -> GenerationResult:
        return self.engine_client.generate(self.run, request, self.track, span)

    def stage(self, phase: Phase) -> AbstractContextManager[None]:
        return self.run.stage(phase)

    def raise_if_unwanted(self) -> None:
        self.engine_client.raise_if_unwanted(self.run)
