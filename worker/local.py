"""`darkroom generate`: the same engine and the same limits, without broker, store or backend."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from config.settings import ModelSettings, PictureSettings, ServiceSettings, SettingsError, load_section
from inference.engine import LocalEngine
from inference.request import AdapterFile, EngineError, GenerationRequest, GenerationResult, StepReport
from watermark.decoding import decode_signature
from watermark.errors import WatermarkError
from watermark.signature import ImageSignature, Signature, TextSignature, Unsigned, sign
from worker.fetching import PEFT_CONFIG, PEFT_WEIGHTS
from worker.job import Job, JobRejected
from worker.labelling import Labeller, provenance_of
from worker.messages import decode
from worker.rejecting import JobRules
from worker.story import request_of


@dataclass(frozen=True, slots=True)
class Files:
    """The local files of an order."""

    adapters: tuple[Path, ...]
    adapter_scale: float
    signature: Path | None
    out: Path


def draw(fields: dict[str, Any], files: Files, *, model_id: str | None, console: Console) -> bool:
    """Draw what the message `fields` ask for into `files.out`; where it cannot be, say why and return False."""
    try:
        job = _job(fields)
        signature = _signature(job, files)
        labeller = Labeller(load_section(PictureSettings))
        settings = load_section(ModelSettings)
        engine = LocalEngine(settings.model_copy(update={"model_id": model_id} if model_id else {}))
        adapters = tuple(_adapter(path, files.adapter_scale) for path in files.adapters)
        result = _generate(engine, request_of(job, adapters, engine.facts), console)
        _write(job, result, signature, files, labeller, model=engine.facts.model, console=console)
    except (SettingsError, JobRejected, EngineError, WatermarkError, OSError) as error:
        console.print("[bold red]Not drawn:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return False
    return True


def _job(fields: dict[str, Any]) -> Job:
    """The order as the job it would be: every limit of the queue holds here too."""
    settings = load_section(ModelSettings)
    body = json.dumps({"data": {"generation_id": 1, **fields}}).encode()
    return decode(body, JobRules(settings.inference_steps, settings.guidance_scale, locate=_nowhere))


def _nowhere(text: str) -> Any:
    raise AssertionError(f"a local order names no object, yet {text!r} was to be located")


def _signature(job: Job, files: Files) -> Signature:
    if files.signature is not None:
        return ImageSignature(decode_signature(files.signature.read_bytes()))
    if job.artist_name:
        return TextSignature(job.artist_name, load_section(ServiceSettings).font_dirs)
    return Unsigned()


def _adapter(path: Path, scale: float) -> AdapterFile:
    if path.is_dir():
        return AdapterFile(path / PEFT_WEIGHTS, path / PEFT_CONFIG, scale)
    return AdapterFile(path, None, scale)


def _generate(engine: LocalEngine, request: GenerationRequest, console: Console) -> GenerationResult:
    with Progress(console=console) as bars:
        bar = bars.add_task("denoising", total=request.num_inference_steps)

        def on_step(report: StepReport) -> None:
            bars.update(bar, completed=report.step_index)

        try:
            return engine.generate(request, on_step, lambda: False).result()
        finally:
            engine.close()


def _write(
    job: Job,
    result: GenerationResult,
    signature: Signature,
    files: Files,
    labeller: Labeller,
    *,
    model: str,
    console: Console,
) -> None:
    adapters = tuple(path.stem for path in files.adapters)
    for number, picture in enumerate(result.pictures, start=1):
        path = files.out if number == 1 else files.out.with_stem(f"{files.out.stem}-{number}")
        image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
        signed = sign(image, signature, job.signature_style)
        provenance = replace(provenance_of(job, result, picture, model=model), adapters=adapters)
        path.write_bytes(labeller.encode(signed, provenance))
        console.print(f"{path}: {picture.width}x{picture.height}, seed {picture.seed}, {result.scheduler}")
