"""`darkroom check`: every part tried for real, one row each, with what to do about a bad one."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from clients.gpu import GpuReading, GpuReadings
from clients.location import ObjectRef
from clients.storage import Storage
from clients.storage_errors import StorageError
from clients.webhooks import BackendUnreachable, reach
from config.settings import ModelSettings, Settings
from inference.checkpoints.checkpoint import identify, weight_bytes
from inference.checkpoints.fit import GB, RESERVE_BYTES, Residence, decide, free_host_bytes
from inference.process import EngineProcess, wait_until_ready
from inference.request import EngineError
from watermark.errors import FontMissing
from watermark.fonts import find_font
from worker.broker import PublishFailed, check_broker

MODEL_TIMEOUT_SECONDS = 900.0
PARAMETER_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class CheckFailed(Exception):
    """A part is not usable; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: the part, whether it can be used, and what was seen or what to do."""

    part: str
    is_good: bool
    detail: str


def check_everything(settings: Settings, console: Console) -> bool:
    """Print the table; True where every part is good."""
    checks: dict[str, Callable[[Settings], str]] = {
        "broker": _check_broker,
        "bucket": _check_bucket,
        "backend": _check_backend,
        "fonts": _check_fonts,
        "model": partial(_check_model, console),
    }
    table = Table("part", "", "what was seen, or what to do")
    findings = [_find(part, check, settings, console) for part, check in checks.items()]
    for finding in findings:
        table.add_row(finding.part, "[green]good[/]" if finding.is_good else "[red]bad[/]", finding.detail)
    console.print(table)
    return all(finding.is_good for finding in findings)


def _find(part: str, check: Callable[[Settings], str], settings: Settings, console: Console) -> Finding:
    with console.status(f"trying the {part}"):
        try:
            return Finding(part, True, check(settings))
        except CheckFailed as error:
            return Finding(part, False, str(error))


def _check_broker(settings: Settings) -> str:
    try:
        depth = check_broker(settings.broker)
    except PublishFailed as error:
        raise CheckFailed(f"{error}. Look at RABBITMQ_HOST, PORT, USER, PASS and VHOST") from error
    if depth < 0:
        return f"connected; queue {settings.broker.queue} does not exist yet and will be made"
    return f"connected; {depth} messages wait in {settings.broker.queue}"


def _check_bucket(settings: Settings) -> str:
    """Write, refuse to overwrite, read and remove an object for real: rights on paper are not enough."""
    store = settings.store
    storage = Storage(store)
    probe = ObjectRef(store.bucket, f"jobs/check-{uuid.uuid4()}.json")
    try:
        storage.check_bucket(store.results_bucket)
        storage.put(probe, b"{}", content_type="application/json")
        is_conditional = not storage.put_if_absent(probe, b"{}", content_type="application/json")
        storage.read(probe, max_bytes=16)
        storage.delete(probe)
    except StorageError as error:
        raise CheckFailed(f"{error}. Look at the AWS_ settings and the rights of the key") from error
    if not is_conditional:
        raise CheckFailed("the store overwrites in spite of If-None-Match: two workers could end one job twice")
    return f"{store.bucket} can be written, read and cleaned; conditional writes work"


def _check_backend(settings: Settings) -> str:
    try:
        status = reach(settings.backend)
    except BackendUnreachable as error:
        raise CheckFailed(f"{error}. Look at BACKEND_API_URL") from error
    if status in (401, 403):
        raise CheckFailed(f"the backend answers {status}: look at INTERNAL_API_TOKEN")
    return f"the backend answers ({status})"


def _check_fonts(settings: Settings) -> str:
    try:
        return f"signatures are written in {find_font('서울 Seoul', settings.service.font_dirs).name}"
    except FontMissing as error:
        raise CheckFailed(
            f"{error}. Install a font with Hangul, like Debian's fonts-nanum, or set FONT_DIRS"
        ) from error


def _check_model(console: Console, settings: Settings) -> str:
    """Foretell, before the minutes of loading, how the model fits; then load it and draw with it."""
    try:
        console.print(foretell_memory(settings.model), highlight=False, markup=False)
        return _load_model(settings.model)
    except EngineError as error:
        raise CheckFailed(f"{error}. Look at MODEL_ID, DEVICE and DTYPE") from error


def foretell_memory(settings: ModelSettings) -> str:
    """What the weights take, what is free, and what comes of it; `EngineStartFailed` where they will not run."""
    gpu = _gpu(settings)
    bytes_each = PARAMETER_BYTES.get(settings.dtype, 4 if gpu is None else 2)
    needed = weight_bytes(identify(settings.model_id, settings.config_source), bytes_each)
    if needed is None:
        return "memory: the weights are not on this machine yet; what they take is known once they are"
    weights = f"memory: {sum(needed.values()) / GB:.2f} GB of weights at {8 * bytes_each} bits"
    if gpu is None:
        free = free_host_bytes()
        fits = "they fit" if sum(needed.values()) <= free else "the machine will swap or kill the worker"
        return f"{weights}, {free / GB:.1f} GB of the host's are free: {fits}"

    free = gpu.memory_total_bytes - gpu.memory_used_bytes
    is_resident = decide(needed, free) is Residence.RESIDENT
    lives = "the model stays on the GPU" if is_resident else "its parts take turns on the GPU, which is slower"
    return f"{weights} and {RESERVE_BYTES / GB:.1f} GB for a picture, {free / GB:.1f} GB of the GPU's are free: {lives}"


def _gpu(settings: ModelSettings) -> GpuReading | None:
    """The GPU that the engine will use; None where that is the CPU."""
    if settings.device == "cpu":
        return None
    index = int(settings.device.partition(":")[2] or 0)
    visible = settings.cuda_visible_devices
    return GpuReadings(str(index) if visible is None else ",".join(visible.split(",")[index:])).read()


def _load_model(settings: ModelSettings) -> str:
    engine = EngineProcess(settings, log_level="ERROR", on_restart=lambda: None)
    engine.start()
    try:
        wait_until_ready(engine, MODEL_TIMEOUT_SECONDS)
    finally:
        engine.close()
    facts = engine.facts
    assert facts is not None, "a ready engine has facts"  # noqa: S101
    step = f"one step of {facts.base_size}x{facts.base_size} takes {facts.step_seconds:.3f} s"
    return f"{facts.model} on {facts.device} as {facts.dtype}: loaded in {facts.load_seconds:.1f} s, {step}"
