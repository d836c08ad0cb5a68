"""A job's story: consult the ledger, fetch, generate, sign, store, record. Here and nowhere else the siblings meet."""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

from PIL import Image

from clients.cache import DownloadCache
from clients.location import ObjectRef
from clients.storage import Storage
from clients.storage_errors import AccessDenied, NotSupported, ObjectDamaged, ObjectNotFound, ObjectTooLarge
from clients.webhooks import WebhookKind
from config.logs import log_event
from inference.request import (
    AdapterFile,
    Engine,
    GenerationRequest,
    GenerationResult,
    ModelFacts,
    Picture,
    RequestCancelled,
    StepReport,
)
from watermark.decoding import decode_signature
from watermark.errors import FontMissing, SignatureInvalid
from watermark.signature import ImageSignature, Signature, SignedPicture, TextSignature, Unsigned, sign
from worker.bodies import CompleteBody, PictureMetadata
from worker.breakers import Gate
from worker.cancelling import Cancellations
from worker.events import TerminalEvent
from worker.job import Job, JobAdapter, JobRejected, resolve_size
from worker.ledger import Ledger
from worker.progress import ProgressReporter
from worker.runs import Reached, Run
from worker.settling import MAX_RECOVERIES, JobFailed, JobReleased, PoisonJob

logger = logging.getLogger(__name__)

# Those of the engine and of the signatures' decoder, which would refuse by another code what is over them.
MAX_ADAPTER_BYTES = 1_000_000_000
MAX_CONFIG_BYTES = 64_000
MAX_SIGNATURE_BYTES = 10_000_000
FETCH_DEADLINE_SECONDS = 300.0
# Before an object that is not there is believed not to be.
SECOND_LOOK_SECONDS = 2.0
# A picture that is drawn is kept in hand over a restart of the store.
PICTURE_PATIENCE_SECONDS = 45.0

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"

PNG = "image/png"

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class StoredPicture:
    """A picture in the results bucket."""

    url: str
    seed: int


@dataclass(frozen=True, slots=True)
class Storyteller:
    """Everything a job's story needs; one for all jobs. `tell` blocks and runs on the job's own thread."""

    storage: Storage
    cache: DownloadCache
    ledger: Ledger
    engine: Engine
    facts: ModelFacts
    progress: ProgressReporter
    results_bucket: str
    font_dirs: tuple[Path, ...]
    worker: str
    is_draining: Event
    cancellations: Cancellations
    gate: Gate

    def tell(self, run: Run) -> TerminalEvent:
        """Do the job unless the ledger knows its end already; return that end, recorded. Raises what breaks it off."""
        with run.stage("ledger"):
            known = self.gate.insist(lambda: self.ledger.find(run.task_id))
        if known is not None:
            return known

        job = _job_of(run)
        if self.cancellations.covers(job):
            run.cancel()
        with ExitStack() as pinned:
            with run.stage("fetch"):
                signature = self._fetch_signature(job)
                adapters = tuple(self._fetch_adapter(adapter, pinned) for adapter in job.adapters)
            result = self._generate(run, job, adapters)

        with run.stage("sign"):
            signed = [_sign(picture, signature, job) for picture in result.pictures]
        with run.stage("store"):
            stored = self._store(job, signed)
        with run.stage("record"):
            event = self._complete(run, job, result, stored)
            return self.gate.insist(lambda: self.ledger.record(event), patience_seconds=PICTURE_PATIENCE_SECONDS)

    def _fetch_signature(self, job: Job) -> Signature:
        """The signature, ready to draw: whatever is wrong with it is found before the GPU is asked for anything."""
        try:
            if job.signature_ref is not None:
                return ImageSignature(decode_signature(self._read_signature(job.signature_ref)))
            if job.artist_name is not None:
                return TextSignature(job.artist_name, self.font_dirs)
            return Unsigned()
        except ObjectNotFound as error:
            raise JobFailed("SIGNATURE_NOT_FOUND", f"the signature {job.signature_ref} does not exist") from error
        except ObjectTooLarge as error:
            raise JobFailed("INPUT_TOO_LARGE", str(error)) from error
        except (ObjectDamaged, SignatureInvalid) as error:
            raise JobFailed("SIGNATURE_INVALID", f"signature {job.signature_ref or 'artist_name'}: {error}") from error
        except FontMissing as error:
            raise JobFailed("FONT_MISSING", f"artist_name: {error}") from error

    def _read_signature(self, ref: ObjectRef) -> bytes:
        def read() -> bytes:
            with self.cache.fetch(ref, max_bytes=MAX_SIGNATURE_BYTES, deadline_seconds=FETCH_DEADLINE_SECONDS) as path:
                return path.read_bytes()

        return self._look_twice(ref, read)

    def _fetch_adapter(self, adapter: JobAdapter, pinned: ExitStack) -> AdapterFile:
        """The adapter's files on the local disk, pinned in the cache until `pinned` closes."""
        ref = adapter.ref
        if ref.key.lower().endswith(".safetensors"):
            return AdapterFile(self._fetch(ref, MAX_ADAPTER_BYTES, pinned), None, adapter.scale)
        config = self._fetch(ref.child(PEFT_CONFIG), MAX_CONFIG_BYTES, pinned)
        weights = self._fetch_weights(ref, pinned)
        return AdapterFile(weights, config, adapter.scale)

    def _fetch_weights(self, folder: ObjectRef, pinned: ExitStack) -> Path:
        try:
            return self._fetch(folder.child(PEFT_WEIGHTS), MAX_ADAPTER_BYTES, pinned)
        except JobFailed:
            if self._exists(folder.child(PEFT_PICKLE)):
                only = f"the adapter {folder} holds only {PEFT_PICKLE}, which may be a pickle"
                raise JobFailed("LORA_UNSAFE_FORMAT", f"{only}; store {PEFT_WEIGHTS}") from None
            raise

    def _fetch(self, ref: ObjectRef, max_bytes: int, pinned: ExitStack) -> Path:
        try:
            return self._look_twice(
                ref,
                lambda: pinned.enter_context(
                    self.cache.fetch(ref, max_bytes=max_bytes, deadline_seconds=FETCH_DEADLINE_SECONDS)
                ),
            )
        except ObjectNotFound as error:
            raise JobFailed("LORA_NOT_FOUND", f"the adapter {ref} does not exist") from error
        except ObjectTooLarge as error:
            raise JobFailed("INPUT_TOO_LARGE", str(error)) from error
        except ObjectDamaged as error:
            raise JobFailed("LORA_INVALID", str(error)) from error

    def _look_twice(self, ref: ObjectRef, fetch: Callable[[], Made]) -> Made:
        """Fetch what a job names. A publisher may be quicker than its own upload, and a store's refusal may be of this
        one object or of us altogether."""
        try:
            return fetch()
        except ObjectNotFound:
            self.is_draining.wait(SECOND_LOOK_SECONDS)
        except AccessDenied:
            self.gate.insist(lambda: self.storage.check_bucket(self.ledger.bucket))
        try:
            return fetch()
        except AccessDenied as error:
            raise JobFailed("INPUT_FORBIDDEN", f"the store does not let this worker read {ref}") from error

    def _exists(self, ref: ObjectRef) -> bool:
        try:
            self.storage.head(ref)
        except ObjectNotFound:
            return False
        return True

    def _generate(self, run: Run, job: Job, adapters: tuple[AdapterFile, ...]) -> GenerationResult:
        self._go_on_or_leave(run)
        request = request_of(job, adapters, self.facts, arrived_at=run.started_at)
        track = self.progress.follow(job.task_id, job.generation_id)

        def on_step(report: StepReport) -> None:
            run.phase = "decode" if report.step_index == report.num_steps else "denoise"
            track.on_step(report)
            run.reached = Reached(report.step_index, report.num_steps, track.seconds_left(report))

        run.phase = "wait"
        try:
            run.future = self.engine.generate(request, on_step, lambda: run.is_cancelled)
            if self.is_draining.is_set() or run.is_cancelled:
                run.future.cancel()
            result = run.future.result()
        except CancelledError:
            self._go_on_or_leave(run)
            raise
        finally:
            track.close()
        run.add_engine_stages(result.stages)
        return result

    def _go_on_or_leave(self, run: Run) -> None:
        """Raise what a job that is not yet being drawn ends with, if it is not to be drawn at all."""
        if run.is_cancelled:
            raise RequestCancelled("cancelled before it was begun")
        if self.is_draining.is_set():
            raise JobReleased("the worker is stopping")

    def _store(self, job: Job, signed: list[SignedPicture]) -> list[StoredPicture]:
        stored = []
        for number, (picture, seed) in enumerate(zip(signed, job.seeds, strict=True), start=1):
            suffix = "" if number == 1 else f"-{number}"
            ref = ObjectRef(self.results_bucket, f"generations/gen-{job.generation_id}{suffix}.png")
            png = picture.encode_png()
            metadata = {"task-id": job.task_id, "sha256": hashlib.sha256(png).hexdigest()}
            self._put_picture(ref, png, metadata)
            stored.append(StoredPicture(self.storage.url_of(ref), seed))
        return stored

    def _put_picture(self, ref: ObjectRef, png: bytes, metadata: dict[str, str]) -> None:
        """Write one picture. What another task left under the same generation gives way, but never in silence."""
        write = partial(self.storage.put_if_absent, ref, png, content_type=PNG, metadata=metadata)
        with suppress(NotSupported):  # by a store without conditional writes, which only overwrites
            if self.gate.insist(write, patience_seconds=PICTURE_PATIENCE_SECONDS):
                return
            other = self.storage.metadata_of(ref).get("task-id", "")
            if other != metadata["task-id"]:
                log_event(logger, "another task's picture replaced", logging.WARNING, key=ref.key, other_task_id=other)
        overwrite = partial(self.storage.put, ref, png, content_type=PNG, metadata=metadata)
        self.gate.insist(overwrite, patience_seconds=PICTURE_PATIENCE_SECONDS)

    def _complete(self, run: Run, job: Job, result: GenerationResult, stored: list[StoredPicture]) -> TerminalEvent:
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
            "seconds": round(sum(seconds for _, _, seconds in timeline), 3),
        }
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
        )


def request_of(
    job: Job, adapters: tuple[AdapterFile, ...], facts: ModelFacts, *, arrived_at: float = 0.0
) -> GenerationRequest:
    """What the engine is asked for, the adapters being on the local disk by now."""
    width, height = resolve_size(job, base_size=facts.base_size, size_multiple=facts.size_multiple)
    return GenerationRequest(
        request_id=job.task_id,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=job.num_inference_steps or facts.default_steps,
        guidance_scale=facts.default_guidance if job.guidance_scale is None else job.guidance_scale,
        cfg_normalization=job.cfg_normalization,
        cfg_truncation=job.cfg_truncation,
        seeds=job.seeds,
        scheduler=job.scheduler,
        adapters=adapters,
        arrived_at=arrived_at,
    )


def _job_of(run: Run) -> Job:
    if isinstance(run.asked, JobRejected):
        raise JobFailed(run.asked.code, str(run.asked)) from run.asked
    if run.num_recoveries > MAX_RECOVERIES:
        raise PoisonJob(f"the job was given up after {run.num_recoveries} workers stopped while doing it")
    return run.asked


def _sign(picture: Picture, signature: Signature, job: Job) -> SignedPicture:
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    return sign(image, signature, job.signature_style)
