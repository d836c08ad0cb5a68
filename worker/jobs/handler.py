"""A job's story: consult the ledger, fetch, generate, sign, store, record. Here and nowhere else the siblings meet."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from clients.storage.location import ObjectRef
from clients.webhooks import WebhookKind
from inference.request import AdapterFile, GenerationRequest, GenerationResult, ModelFacts, Picture
from watermark.geometry import Rect
from watermark.signature import SignedPicture
from worker.breakers import StoreGate
from worker.errors import JobFailed, PoisonJob
from worker.jobs.cancellations import Cancellations
from worker.jobs.disposition import MAX_RECOVERIES
from worker.jobs.engine_client import EngineClient, GeneratedImages
from worker.jobs.inputs.fetcher import Fetched, Fetcher
from worker.jobs.inputs.references import NO_REFERENCES, References, check_can, drawing_size
from worker.jobs.postprocess import finish
from worker.jobs.runs import Run
from worker.messages.generation_id import picture_key
from worker.messages.identity import check_same
from worker.messages.job import Job, JobRejected, Kind
from worker.messages.webhook_bodies import CompleteBody, PictureMetadata
from worker.product.generation import ProductGeneration
from worker.product.inputs import ProductInputs
from worker.product.stage_store import ProductStage, StageStore
from worker.progress.reporter import ProgressReporter
from worker.results.image_metadata import ImageEncoder, provenance_of
from worker.results.image_store import PICTURE_PATIENCE_SECONDS, AlreadyEnded, ImageStore
from worker.results.ledger import Ledger
from worker.results.terminal_event import TerminalEvent


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture in the results bucket."""

    url: str
    seed: int


@dataclass(frozen=True, slots=True)
class JobHandler:
    """Everything a job's story needs; one for all jobs. `tell` blocks and runs on the job's own thread."""

    ledger: Ledger
    fetcher: Fetcher
    drawer: EngineClient
    products: ProductGeneration
    store: ImageStore
    facts: ModelFacts
    progress: ProgressReporter
    labeller: ImageEncoder
    results_bucket: str
    worker: str
    cancellations: Cancellations
    gate: StoreGate

    def tell(self, run: Run) -> TerminalEvent:
        """Do the job unless the ledger knows its end already; return that end, recorded.

        Raises what breaks it off, and `TaskIdTaken` where the end is another generation's.
        """
        with run.stage("ledger"):
            end = self.gate.insist(lambda: self.ledger.find(run.task_id))
        if end is None:
            try:
                end = self._draw(run)
            except AlreadyEnded as elsewhere:
                end = elsewhere.end
        check_same(run.asked, run.first.body, end.generation_id, end.fingerprint)
        return end

    def _draw(self, run: Run) -> TerminalEvent:
        job = _job_of(run)
        check_can(job, self.facts)
        if self.cancellations.covers(job):
            run.cancel()
        with ExitStack() as pinned:
            with run.stage("fetch"):
                fetched = self.fetcher.everything(job, pinned)
                brought = self.products.fetch(job)
            shelf = self.products.shelf(job)
            result, keep_off = self._generate(run, job, fetched, brought, shelf)

        with run.stage("sign"):
            signed = [self._finish(picture, job, fetched, shelf, keep_off) for picture in result.pictures]
        with run.stage("store"):
            files = [
                self.labeller.encode(picture, provenance_of(job, result, drawn, model=self.facts.model))
                for picture, drawn in zip(signed, result.pictures, strict=True)
            ]
            self.store.check_open(job.task_id)
            stored = self._store(job, result, files, shelf)
        with run.stage("record"):
            event = self._complete(run, job, result, stored, shelf)
            return self.gate.insist(lambda: self.ledger.record(event), patience_seconds=PICTURE_PATIENCE_SECONDS)

    def _generate(
        self, run: Run, job: Job, fetched: Fetched, brought: ProductInputs | None, shelf: StageStore
    ) -> GeneratedImages:
        references = brought.references if brought else fetched.references
        request = request_of(job, fetched.adapters, self.facts, references, arrived_at=run.started_at)
        track = self.progress.follow(job.task_id, job.generation_id)
        try:
            if brought is not None:
                return self.products.make(run, brought, request, track, shelf)
            return GeneratedImages(self.drawer.draw(run, request, track))
        finally:
            track.close()

    def _finish(
        self, picture: Picture, job: Job, fetched: Fetched, shelf: StageStore, keep_off: tuple[Rect, ...]
    ) -> SignedPicture:
        return finish(
            picture,
            job,
            fetched.references,
            headlines=fetched.headlines,
            signature=fetched.signature,
            keep_off=keep_off,
            on_headlines=partial(shelf.keep, ProductStage.HEADLINE) if job.product else lambda _: None,
        )

    def _store(self, job: Job, result: GenerationResult, files: list[bytes], shelf: StageStore) -> list[StoredPicture]:
        stored = []
        for number, (png, drawn) in enumerate(zip(files, result.pictures, strict=True), start=1):
            ref = ObjectRef(self.results_bucket, picture_key(job.generation_id, number))
            stored.append(StoredPicture(self.store.put(ref, png, task_id=job.task_id), drawn.seed))
            if job.product is not None:
                shelf.save_png(ProductStage.FINAL, png)
        return stored

    def _complete(
        self, run: Run, job: Job, result: GenerationResult, stored: list[StoredPicture], shelf: StageStore
    ) -> TerminalEvent:
        timeline = run.timeline()
        metadata: PictureMetadata = {
            "seed": job.seed,
            "steps": result.num_inference_steps,
            "guidance_scale": result.guidance_scale,
            "prompt_tags": list(job.prompt_tags),
            "width": result.pictures[0].width,
            "height": result.pictures[0].height,
            "model": self.facts.model,
            "scheduler": result.scheduler,
            "task_id": job.task_id,
            "seconds": run.seconds,
        }
        if job.kind is not Kind.TEXT2IMAGE:
            metadata["kind"] = job.kind.value
        if job.style is not None:
            metadata["style"] = job.style
        if job.industry is not None:
            metadata["industry"] = job.industry
        if shelf.listing:
            metadata["stages"] = shelf.listing
        if job.ignored:
            metadata["ignored"] = list(job.ignored)
        if len(stored) > 1:
            metadata["result_urls"] = [one.url for one in stored]
            metadata["seeds"] = [one.seed for one in stored]
        body: CompleteBody = {
            "generation_id": job.generation_id,
            "result_url": stored[0].url,
            "metadata": metadata,
        }
        return TerminalEvent(
            job.task_id,
            job.generation_id,
            WebhookKind.COMPLETE,
            body,
            run.began_at,
            timeline,
            self.worker,
            attempt=run.attempt,
            ended_at=run.now,
            fingerprint=run.fingerprint,
        )


def request_of(
    job: Job,
    adapters: tuple[AdapterFile, ...],
    facts: ModelFacts,
    references: References = NO_REFERENCES,
    *,
    arrived_at: float = 0.0,
) -> GenerationRequest:
    """What the engine is asked for, the adapters being on the local disk by now."""
    size = drawing_size(job, facts, references.proportions)
    return GenerationRequest(
        request_id=job.task_id,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=job.num_inference_steps or facts.default_steps,
        guidance_scale=facts.default_guidance if job.guidance_scale is None else job.guidance_scale,
        cfg_normalization=job.cfg_normalization,
        cfg_truncation=job.cfg_truncation,
        seeds=job.seeds,
        scheduler=job.scheduler,
        adapters=adapters,
        source=references.source_for(job, size),
        control=references.control_for(job, size),
        arrived_at=arrived_at,
    )


def _job_of(run: Run) -> Job:
    if isinstance(run.asked, JobRejected):
        raise JobFailed(run.asked.code, str(run.asked)) from run.asked
    if run.num_recoveries > MAX_RECOVERIES:
        raise PoisonJob(f"the job was given up after {run.num_recoveries} workers stopped while doing it")
    return run.asked
