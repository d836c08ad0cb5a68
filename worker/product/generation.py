"""A product job's story: the making of its picture in a job's run, each stage kept in the store."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from inference.request import GenerationRequest, GenerationResult
from worker.jobs.engine_client import EngineClient, GeneratedImages, ProgressSpan
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.references import drawing_size
from worker.jobs.runs import Run
from worker.messages.job import Job
from worker.product.composer import ProductComposer
from worker.product.cutter import Cutter
from worker.product.inputs import ProductInputs, load_inputs
from worker.product.stage_store import StageStore
from worker.progress.reporter import JobProgress
from worker.results.image_store import ImageStore


@dataclass(frozen=True, slots=True)
class ProductGeneration:
    """Everything that product jobs need; one for all of them. Its methods block, on the job's own thread."""

    fetcher: Fetcher
    drawer: EngineClient
    store: ImageStore
    cutter: Cutter
    private_bucket: str

    def fetch(self, job: Job) -> ProductInputs | None:
        """What a product job brings, at the drawing's size; None for a job of another kind."""
        if job.product is None:
            return None
        brought = load_inputs(job.product, job.fit, self.fetcher.picture)
        return brought.at(drawing_size(job, self.fetcher.facts, brought.proportions))

    def shelf(self, job: Job) -> StageStore:
        """Where the job's stages are kept."""
        return StageStore(self.store, self.private_bucket, job)

    def make(
        self, run: Run, brought: ProductInputs, request: GenerationRequest, track: JobProgress, shelf: StageStore
    ) -> GeneratedImages:
        """What `Making` makes of it, in this run and with this shelf."""
        brought.note(shelf)
        workshop = _RunsWorkshop(self.drawer, run, track)
        return ProductComposer(workshop, shelf, self.cutter, request, brought, request.scheduler or "").drawn()


@dataclass(frozen=True, slots=True)
class _RunsWorkshop:
    drawer: EngineClient
    run: Run
    track: JobProgress

    def draw(self, request: GenerationRequest, leg: ProgressSpan) -> GenerationResult:
        return self.drawer.draw(self.run, request, self.track, leg)

    def stage(self, name: str) -> AbstractContextManager[None]:
        return self.run.stage(name)

    def raise_if_unwanted(self) -> None:
        self.drawer.raise_if_unwanted(self.run)
