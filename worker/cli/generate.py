"""`darkroom generate`: the same engine and the same limits, without broker, store or backend."""

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID

from config.images import ImageSettings
from config.model import DEFAULT_MODEL, ModelSettings
from config.section import SettingsError, load_section
from config.service import ServiceSettings
from config.visible_gpus import gpu_variables
from inference.engine.local_engine import LocalEngine
from inference.errors import EngineError
from inference.models.prechecks import precheck_model
from inference.request import GenerationRequest, GenerationResult, StepReport
from watermark.decoding import ImageMode
from watermark.errors import WatermarkError
from worker.cli.file_source import FileSource, FileUnreadable, local_file
from worker.cli.outputs import Output, OutputRefused, outputs_of
from worker.errors import CuttingFailed, JobFailed
from worker.jobs.engine_client import GeneratedImages, ProgressSpan
from worker.jobs.handler import request_of
from worker.jobs.inputs.fetcher import Fetcher, JobInputs
from worker.jobs.inputs.references import References, check_supported
from worker.jobs.postprocess import postprocess
from worker.jobs.runs import Phase
from worker.messages.decoder import decode
from worker.messages.job import Job, JobRejected
from worker.messages.presets import presets_in_force
from worker.messages.rules import JobRules
from worker.product.composer import ProductComposer
from worker.product.cutter import Cutter
from worker.product.inputs import ProductInputs, load_inputs
from worker.product.stage_store import ProductStage
from worker.results.image_metadata import ImageEncoder, provenance_of
from worker.results.image_store import NO_METADATA


def draw(fields: dict[str, Any], out: Path, *, model: str | None, console: Console) -> bool:
    """Draw what the message `fields` ask for into `out`; where it cannot be, say why and return False.

    `model` is one of MODELS, or a folder or hub id.

    Adapters and pictures that the fields name are files of this machine.
    """
    try:
        _draw(_planned(fields, out, model), console)
    except (
        SettingsError,
        JobRejected,
        JobFailed,
        CuttingFailed,
        FileUnreadable,
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
    inputs: JobInputs
    product: ProductInputs | None
    image_encoder: ImageEncoder
    cutter: Cutter

    @property
    def references(self) -> References:
        return self.product.references if self.product else self.inputs.references


def _planned(fields: dict[str, Any], out: Path, model: str | None) -> _Plan:
    """Find all that can be wrong without the model, which takes minutes to load."""
    settings, images = _settings_of(model), load_section(ImageSettings)
    # The fields are decoded as a message's are, with every limit.
    presets = presets_in_force(images, locate=None)
    rules = JobRules(settings.inference_steps, settings.guidance_scale, local_file, presets, settings.guidance_rescale)
    job = decode(json.dumps({"data": {"generation_id": 1, **fields}}).encode(), rules)
    outputs = outputs_of(out, job.num_images)
    cutter = Cutter(images.cutout_model)
    fetcher = Fetcher(FileSource(), load_section(ServiceSettings).font_dirs)
    product = load_inputs(job.product, job.fit, fetcher.image) if job.product else None
    if product and product.image is not None and product.cutout is None:
        cutter.check(product.image, "product.image_path")
    plan = _Plan(
        job=job,
        settings=settings,
        outputs=outputs,
        inputs=fetcher.fetch_inputs(job, ExitStack()),
        product=product,
        image_encoder=ImageEncoder(images),
        cutter=cutter,
    )
    foreseen = precheck_model(plan.settings)
    check_supported(job, foreseen)
    foreseen.check(job.scheduler, plan.inputs.adapters)
    return plan


def _settings_of(model: str | None) -> ModelSettings:
    """Return the settings of the one model that draws."""
    settings = load_section(ModelSettings)
    if model is None or model in settings.model_names:
        return settings.of_model(model or DEFAULT_MODEL)
    return settings.of_model(DEFAULT_MODEL).model_copy(update={"model_id": model})


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
            headlines=plan.inputs.headlines,
            signature=plan.inputs.signature,
            keep_off=keep_off,
        )
        provenance = provenance_of(plan.job, result, drawn, model=engine.facts.model)
        output.path.write_bytes(plan.image_encoder.encode(signed, provenance, output.format))
        shown = f"{output.path}: {drawn.width}x{drawn.height}, seed {drawn.seed}, {result.scheduler}"
        console.print(shown, markup=False, highlight=False, soft_wrap=True)


def _generate(engine: LocalEngine, plan: _Plan, console: Console) -> GeneratedImages:
    try:
        check_supported(plan.job, engine.facts)
        request = request_of(plan.job, plan.inputs.adapters, engine.facts, plan.references)
        with Progress(console=console) as bars:
            context = _LocalContext(engine, bars, bars.add_task("denoising"))
            if plan.product is None:
                return GeneratedImages(context.generate(request))
            fitted = plan.product.at((request.width, request.height))
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
