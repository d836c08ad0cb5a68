"""`darkroom generate`: the same engine and the same limits, without broker, store or backend."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID

from clients.storage.location import LocationForbidden, ObjectRef, shown_location
from config.images import ImageSettings
from config.model import ModelSettings
from config.section import SettingsError, load_section
from config.service import ServiceSettings
from config.visible_gpus import gpu_variables
from inference.engine.local_engine import LocalEngine
from inference.errors import EngineError
from inference.models.prechecks import precheck_model
from inference.request import AdapterFile, GenerationRequest, GenerationResult, StepReport
from watermark.decoding import ImageMode, decode_image, decode_signature
from watermark.errors import WatermarkError
from watermark.signature import ImageSignature, Signature, TextSignature, Unsigned
from watermark.text.headline import Headline, prepare_headlines
from worker.cli.outputs import Output, OutputRefused, outputs_of
from worker.errors import CuttingFailed, JobFailed
from worker.jobs.engine_client import GeneratedImages, ProgressSpan
from worker.jobs.handler import request_of
from worker.jobs.inputs.peft_folders import PEFT_CONFIG, PEFT_WEIGHTS, WANTS_CONFIG, is_named_by_peft
from worker.jobs.inputs.references import References, check_can, check_mask
from worker.jobs.postprocess import postprocess
from worker.jobs.runs import Phase
from worker.messages.decoder import decode
from worker.messages.job import Job, JobAdapter, JobProduct, JobRejected
from worker.messages.presets import presets_in_force
from worker.messages.rules import JobRules
from worker.product.composer import ProductComposer
from worker.product.cutter import Cutter
from worker.product.inputs import ProductInputs, load_inputs
from worker.product.stage_store import ProductStage
from worker.results.image_metadata import ImageEncoder, provenance_of
from worker.results.image_store import NO_METADATA

# A file of this machine, as an object of no bucket: its path is the key.
NO_BUCKET = ""


class NotDrawn(Exception):
    """A file cannot be used; the message says which."""


def draw(fields: dict[str, Any], out: Path, *, model_id: str | None, console: Console) -> bool:
    """Draw what the message `fields` ask for into `out`; where it cannot be, say why and return False.

    Adapters and pictures that the fields name are files of this machine.
    """
    try:
        _draw(_planned(fields, out, model_id), console)
    except (
        SettingsError,
        JobRejected,
        JobFailed,
        CuttingFailed,
        NotDrawn,
        OutputRefused,
        EngineError,
        WatermarkError,
        OSError,
    ) as error:
        console.print("[bold red]Not drawn:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Plan:
    """A job with all that it needs but the model, read and checked."""

    job: Job
    settings: ModelSettings
    outputs: list[Output]
    signature: Signature
    headlines: tuple[Headline, ...]
    references: References
    brought: ProductInputs | None
    adapters: tuple[AdapterFile, ...]
    labeller: ImageEncoder
    cutter: Cutter


def _planned(fields: dict[str, Any], out: Path, model_id: str | None) -> _Plan:
    """Find all that can be wrong without the model, which takes minutes to load."""
    settings, images = load_section(ModelSettings), load_section(ImageSettings)
    # The fields are decoded as a message's are, with every limit.
    rules = JobRules(settings.inference_steps, settings.guidance_scale, _here, presets_in_force(images, locate=None))
    job = decode(json.dumps({"data": {"generation_id": 1, **fields}}).encode(), rules)
    outputs = outputs_of(out, job.num_images)
    font_dirs = load_section(ServiceSettings).font_dirs
    cutter = Cutter(images.cutout_model)
    brought = _brought(job, job.product, cutter) if job.product else None
    plan = _Plan(
        job=job,
        settings=settings.model_copy(update={"model_id": model_id} if model_id else {}),
        outputs=outputs,
        signature=_signature(job, font_dirs),
        headlines=prepare_headlines(job.overlays, font_dirs),
        references=brought.references if brought else _references(job),
        brought=brought,
        adapters=tuple(_adapter(adapter) for adapter in job.adapters),
        labeller=ImageEncoder(images),
        cutter=cutter,
    )
    foreseen = precheck_model(plan.settings)
    check_can(job, foreseen)
    foreseen.check(job.scheduler, plan.adapters)
    return plan


def _draw(plan: _Plan, console: Console) -> None:
    # Here the engine has no process of its own. CUDA reads them when it is first asked for something: not before this.
    os.environ.update(gpu_variables(plan.settings.device, plan.settings.cuda_visible_devices))
    with console.status(f"loading {plan.settings.model_id}"):
        engine = LocalEngine(plan.settings)
    result, keep_off = _generate(engine, plan, console)
    for drawn, output in zip(result.images, plan.outputs, strict=True):
        signed = postprocess(
            drawn,
            plan.job,
            plan.references,
            headlines=plan.headlines,
            signature=plan.signature,
            keep_off=keep_off,
        )
        provenance = provenance_of(plan.job, result, drawn, model=engine.facts.model)
        output.path.write_bytes(plan.labeller.encode(signed, provenance, output.format))
        shown = f"{output.path}: {drawn.width}x{drawn.height}, seed {drawn.seed}, {result.scheduler}"
        console.print(shown, markup=False, highlight=False, soft_wrap=True)


def _here(text: str) -> ObjectRef:
    if "://" in text:
        raise LocationForbidden(f"{shown_location(text)} is in a store, which is not read here: name a file")
    return ObjectRef(NO_BUCKET, text)


def _signature(job: Job, font_dirs: tuple[Path, ...]) -> Signature:
    if job.signature_ref is not None:
        return ImageSignature(_decoded(job.signature_ref, decode_signature))
    if job.artist_name:
        return TextSignature(job.artist_name, font_dirs)
    return Unsigned()


def _references(job: Job) -> References:
    init = mask = control = None
    if job.source is not None:
        init = _decoded(job.source.image_ref, partial(decode_image, mode="RGB"))
        if job.source.mask_ref is not None:
            mask = _decoded(job.source.mask_ref, partial(decode_image, mode="L"))
            check_mask(mask, init.size)
    if job.control is not None:
        control = _decoded(job.control.image_ref, partial(decode_image, mode="RGB"))
    return References(init, mask, control)


def _brought(job: Job, product: JobProduct, cutter: Cutter) -> ProductInputs:
    brought = load_inputs(product, job.fit, lambda ref, _field, mode: _decoded(ref, partial(decode_image, mode=mode)))
    if brought.image is not None and brought.cutout is None:
        cutter.check(brought.image, "product.image_path")
    return brought


def _decoded(ref: ObjectRef, decode_bytes: Callable[[bytes], Image.Image]) -> Image.Image:
    path = Path(ref.key)
    try:
        return decode_bytes(path.read_bytes())
    except OSError as error:
        raise NotDrawn(f"{path} cannot be read ({error.strerror})") from error
    except WatermarkError as error:
        raise NotDrawn(f"{path}: {error}") from error


def _adapter(adapter: JobAdapter) -> AdapterFile:
    path = Path(adapter.ref.key)
    folder = path.parent if path.name == PEFT_CONFIG else path
    if folder.is_dir():
        return AdapterFile(_found(folder / PEFT_WEIGHTS), _found(folder / PEFT_CONFIG), adapter.scale)
    config = path.with_name(PEFT_CONFIG)
    has_config = path.name == PEFT_WEIGHTS and config.is_file()
    if not is_named_by_peft(_found(path)) and not has_config:
        return AdapterFile(path, None, adapter.scale)
    if not config.is_file():
        raise NotDrawn(f"the adapter {path} {WANTS_CONFIG}")
    return AdapterFile(path, config, adapter.scale)


def _found(path: Path) -> Path:
    if path.is_file():
        return path
    if path.parent.is_dir() and path.name in (PEFT_CONFIG, PEFT_WEIGHTS):
        raise NotDrawn(f"--lora: the folder {path.parent} is no PEFT adapter, as it holds no {path.name}")
    raise NotDrawn(f"--lora {path}: there is no such file or folder")


def _generate(engine: LocalEngine, plan: _Plan, console: Console) -> GeneratedImages:
    try:
        check_can(plan.job, engine.facts)
        request = request_of(plan.job, plan.adapters, engine.facts, plan.references)
        with Progress(console=console) as bars:
            context = _LocalContext(engine, bars, bars.add_task("denoising"))
            if plan.brought is None:
                return GeneratedImages(context.generate(request))
            fitted = plan.brought.at((request.width, request.height))
            return ProductComposer(
                context, _NoStages(), plan.cutter, request, fitted, request.scheduler or ""
            ).generate()
    finally:
        engine.close()


@dataclass(frozen=True, slots=True)
class _LocalContext:
    """The engine of this process, before the eyes of whoever typed the command."""

    engine: LocalEngine
    bars: Progress
    bar: TaskID

    def generate(self, request: GenerationRequest, span: ProgressSpan | None = None) -> GenerationResult:
        def on_step(report: StepReport) -> None:
            shown = span.rescale(report) if span else report
            self.bars.update(self.bar, completed=shown.step_index, total=shown.num_steps)

        return self.engine.generate(request, on_step, lambda: False).result()

    def stage(self, _phase: Phase) -> AbstractContextManager[None]:
        return nullcontext()

    def raise_if_unwanted(self) -> None:
        pass


class _NoStages:
    """No stage of a product is kept: what is wanted of it is one file."""

    def find(self, _stage: ProductStage, _mode: ImageMode) -> None:
        return None

    def save(self, _stage: ProductStage, _image: Image.Image, _metadata: Mapping[str, str] = NO_METADATA) -> None:
        pass
