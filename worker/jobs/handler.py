"""The handling of a job: consult the ledger, fetch, generate, sign, store, record."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from clients.storage.location import ObjectRef
from clients.webhooks import WebhookKind
from inference.request import AdapterFile, GenerationRequest, GenerationResult, ModelFacts
from worker.breakers import StoreGate
from worker.errors import ErrorCode, JobFailed, PoisonJob
from worker.jobs.cancellations import Cancellations
from worker.jobs.disposition import MAX_RECOVERIES
from worker.jobs.engine_client import GeneratedImages
from worker.jobs.generation import Generation, Generations
from worker.jobs.inputs.fetcher import Fetcher, JobInputs
from worker.jobs.inputs.references import NO_REFERENCES, References, check_supported, output_size
from worker.jobs.postprocess import postprocess
from worker.jobs.runs import Phase, Run
from worker.messages.generation_id import image_key
from worker.messages.identity import check_same
from worker.messages.job import Job, JobRejected, Kind
from worker.messages.webhook_bodies import CompleteBody, ImageMetadata
from worker.progress.reporter import ProgressReporter
from worker.results.image_metadata import ImageEncoder, provenance_of
from worker.results.image_store import IMAGE_PATIENCE_SECONDS, AlreadyEnded, ImageStore
from worker.results.ledger import Ledger
from worker.results.terminal_event import TerminalEvent

# Shown at half of it on the status page, sharp on a dense screen.
THUMBNAIL_PIXELS = 96


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the results bucket."""

    url: str
    seed: int


@dataclass(frozen=True, slots=True)
class JobHandler:
    """Handles jobs of every kind; one for all. `handle` blocks and runs on the job's own thread.

    `facts` are of each model by its name, `worker` is this worker's name in the records. With `makes_thumbnails` a run
    keeps a small copy of its first image.
    """

    ledger: Ledger
    fetcher: Fetcher
    generations: Generations
    store: ImageStore
    facts: Mapping[str, ModelFacts]
    progress: ProgressReporter
    encoder: ImageEncoder
    results_bucket: str
    worker: str
    cancellations: Cancellations
    gate: StoreGate
    makes_thumbnails: bool = False

    def handle(self, run: Run) -> TerminalEvent:
        """Run the job unless the ledger has its end; return that end, recorded.

        Raises what `decide` decides about, and `TaskIdTaken` where the end is another generation's.
        """
        with run.stage(Phase.LEDGER):
            end = self.gate.retry_while_denied(lambda: self.ledger.find(run.task_id))
        if end is None:
            try:
                end = self._do(run)
            except AlreadyEnded as elsewhere:
                end = elsewhere.end
        check_same(run.decoded, run.first.body, end.generation_id, end.fingerprint)
        return end

    def _do(self, run: Run) -> TerminalEvent:
        job = _job_of(run)
        check_supported(job, self.facts[job.model])
        if self.cancellations.covers(job):
            run.cancel()
        with ExitStack() as pinned:
            with run.stage(Phase.FETCH):
                inputs = self.fetcher.fetch_inputs(job, pinned)
                generation = self.generations[job.kind](job, inputs)
            images = self._generate(run, job, inputs, generation)

        with run.stage(Phase.SIGN):
            signed = [
                postprocess(
                    image,
                    job,
                    generation.references,
                    headlines=inputs.headlines,
                    signature=inputs.signature,
                    keep_off=images.keep_off,
                    on_headlines=generation.save_headline,
                )
                for image in images.result.images
            ]
            if self.makes_thumbnails:
                run.thumbnail = signed[0].encode_thumbnail(THUMBNAIL_PIXELS)
        with run.stage(Phase.STORE):
            files = [
                self.encoder.encode(
                    image, provenance_of(job, images.result, generated, model=self.facts[job.model].model)
                )
                for image, generated in zip(signed, images.result.images, strict=True)
            ]
            self.store.check_open(job.task_id)
            stored = self._store(job, images.result, files, generation)
        with run.stage(Phase.RECORD):
            event = self._complete(run, job, images.result, stored, generation)
            return self.gate.retry_while_denied(
                lambda: self.ledger.record(event), patience_seconds=IMAGE_PATIENCE_SECONDS
            )

    def _generate(self, run: Run, job: Job, inputs: JobInputs, generation: Generation) -> GeneratedImages:
        facts = self.facts[job.model]
        request = request_of(job, inputs.adapters, facts, generation.references, arrived_at=run.started_monotonic)
        track = self.progress.follow(job.task_id, job.generation_id, run.trace)
        try:
            return generation.generate(run, request, track)
        finally:
            track.close()

    def _store(
        self, job: Job, result: GenerationResult, files: list[bytes], generation: Generation
    ) -> list[StoredImage]:
        stored = []
        for number, (content, generated) in enumerate(zip(files, result.images, strict=True), start=1):
            ref = ObjectRef(self.results_bucket, image_key(job.generation_id, number))
            stored.append(StoredImage(self.store.put(ref, content, task_id=job.task_id), generated.seed))
            generation.save_final(content)
        return stored

    def _complete(
        self, run: Run, job: Job, result: GenerationResult, stored: list[StoredImage], generation: Generation
    ) -> TerminalEvent:
        timeline = run.timeline()
        metadata: ImageMetadata = {
            "seed": job.seed,
            "steps": result.num_inference_steps,
            "guidance_scale": result.guidance_scale,
            "prompt_tags": list(job.prompt_tags),
            "width": result.images[0].width,
            "height": result.images[0].height,
            "model": self.facts[job.model].model,
            "scheduler": result.scheduler,
            "task_id": job.task_id,
            "seconds": run.seconds,
        }
        if result.guidance_rescale:
            metadata["guidance_rescale"] = result.guidance_rescale
        if job.kind is not Kind.TEXT2IMAGE:
            metadata["kind"] = job.kind.value
        if job.style is not None:
            metadata["style"] = job.style
        if job.industry is not None:
            metadata["industry"] = job.industry
        if generation.stages:
            metadata["stages"] = dict(generation.stages)
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
            run.started_unix,
            timeline,
            self.worker,
            attempt=run.attempt,
            ended_at=run.now,
            fingerprint=run.fingerprint,
            traceparent=run.trace.traceparent,
            tracestate=run.trace.tracestate,
        )


def request_of(
    job: Job,
    adapters: tuple[AdapterFile, ...],
    facts: ModelFacts,
    references: References = NO_REFERENCES,
    *,
    arrived_at: float = 0.0,
) -> GenerationRequest:
    """Return the engine's request for a job whose adapters are on the local disk."""
    size = output_size(job, facts, references.proportions)
    return GenerationRequest(
        request_id=job.task_id,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=job.num_inference_steps or facts.default_steps,
        guidance_scale=facts.default_guidance if job.guidance_scale is None else job.guidance_scale,
        guidance_rescale=job.guidance_rescale,
        cfg_normalization=job.cfg_normalization,
        cfg_truncation=job.cfg_truncation,
        true_cfg_scale=job.true_cfg_scale,
        seeds=job.seeds,
        scheduler=job.scheduler,
        adapters=adapters,
        source=references.source_for(job, size),
        control=references.control_for(job, size),
        references=references.for_edit(),
        arrived_at=arrived_at,
        model=job.model,
    )


def _job_of(run: Run) -> Job:
    """Return the job. Raises `JobFailed` for a rejected message, `PoisonJob` after too many killed workers."""
    if isinstance(run.decoded, JobRejected):
        raise JobFailed(ErrorCode(run.decoded.code), str(run.decoded)) from run.decoded
    if run.num_recoveries > MAX_RECOVERIES:
        raise PoisonJob(f"the job was given up after {run.num_recoveries} workers stopped while doing it")
    return run.decoded
