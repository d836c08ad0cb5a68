"""A product job's story: the making of its picture in a job's run, each stage kept in the store."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from inference.request import GenerationRequest, GenerationResult
from worker.jobs.engine_client import Drawer, Drawn, Leg
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.references import drawing_size
from worker.jobs.runs import Run
from worker.messages.job import Job
from worker.product.composer import Making
from worker.product.cutter import Cutter
from worker.product.inputs import Brought, bring
from worker.product.stage_store import Shelf
from worker.progress.reporter import Track
from worker.results.image_store import PictureStore


@dataclass(frozen=True, slots=True)
class ProductTeller:
    """Everything that product jobs need; one for all of them. Its methods block, on the job's own thread."""

    fetcher: Fetcher
    drawer: Drawer
    store: PictureStore
    cutter: Cutter
    private_bucket: str

    def fetch(self, job: Job) -> Brought | None:
        """What a product job brings, at the drawing's size; None for a job of another kind."""
        if job.product is None:
            return None
        brought = bring(job.product, job.fit, self.fetcher.picture)
        return brought.at(drawing_size(job, self.fetcher.facts, brought.proportions))

    def shelf(self, job: Job) -> Shelf:
        """Where the job's stages are kept."""
        return Shelf(self.store, self.private_bucket, job)

    def make(self, run: Run, brought: Brought, request: GenerationRequest, track: Track, shelf: Shelf) -> Drawn:
        """What `Making` makes of it, in this run and with this shelf."""
        brought.note(shelf)
        workshop = _RunsWorkshop(self.drawer, run, track)
        return Making(workshop, shelf, self.cutter, request, brought, request.scheduler or "").drawn()


@dataclass(frozen=True, slots=True)
class _RunsWorkshop:
    drawer: Drawer
    run: Run
    track: Track

    def draw(self, request: GenerationRequest, leg: Leg) -> GenerationResult:
        return self.drawer.draw(self.run, request, self.track, leg)

    def stage(self, name: str) -> AbstractContextManager[None]:
        return self.run.stage(name)

    def go_on_or_leave(self) -> None:
        self.drawer.go_on_or_leave(self.run)
