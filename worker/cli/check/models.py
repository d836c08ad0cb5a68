"""Check the models: the image model, the slowest of the checks, and the one that cuts products out."""

import importlib.util
import time
from collections.abc import Callable

from PIL import Image, ImageDraw

from config.images import ImageSettings
from config.model import ModelSettings
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.pipeline import weight_bytes
from inference.errors import EngineError
from inference.process.engine_process import EngineProcess, wait_until_ready
from inference.request import ModelFacts
from worker.cli.check.checks import CheckFailed
from worker.errors import CuttingFailed, JobFailed
from worker.product.cutter import Cutter

SIDE_PX = 256

LOAD_TIMEOUT_SECONDS = 900.0
SINGLE_PRECISION_BYTES = 4

# Loads the model, draws with it and lets it go; raises `EngineError`.
Load = Callable[[ModelSettings], ModelFacts]


def check_model(settings: ModelSettings, load: Load) -> str:
    """Load the model and time a step. Headers come first: a truncated file is found before gigabytes are read."""
    try:
        found = identify(
            settings.model_id, settings.config_source, has_checker=settings.safety_checker, vae_id=settings.vae_id
        )
        weight_bytes(found, SINGLE_PRECISION_BYTES)
        facts = load(settings)
    except EngineError as error:
        raise CheckFailed(f"{error}. Look at MODEL_ID {settings.model_id}, DEVICE and DTYPE") from error
    step = f"one step of {facts.base_size}x{facts.base_size} takes {facts.step_seconds:.3f} s"
    return f"{facts.model} on {facts.device} as {facts.dtype}: loaded in {facts.load_seconds:.1f} s, {step}"


def load_in_own_process(settings: ModelSettings) -> ModelFacts:
    """Load the model in a process of its own, as the worker does."""
    engine = EngineProcess(settings, log_level="ERROR", on_restart=lambda: None)
    engine.start()
    try:
        wait_until_ready(engine, LOAD_TIMEOUT_SECONDS)
    finally:
        engine.close()
    assert engine.facts is not None, "a ready engine has facts"  # noqa: S101
    return engine.facts


def check_cutout(settings: ImageSettings) -> str:
    """Cut a drawn disc out of a white picture, as a product without alpha."""
    model = settings.cutout_model
    if model is None:
        return "no CUTOUT_MODEL: products need alpha of their own"
    # The libraries of the extra `cutout`.
    if not all(importlib.util.find_spec(library) for library in ("rembg", "onnxruntime")):
        cure = "install the extra `cutout`, in a checkout by pip install '.[cutout]'"
        raise CheckFailed(f"CUTOUT_MODEL is set, but rembg is not installed: {cure}")
    image = Image.new("RGBA", (SIDE_PX, SIDE_PX), "white")
    ImageDraw.Draw(image).ellipse((64, 64, 192, 192), fill=(120, 40, 30))
    began_at = time.monotonic()
    try:
        Cutter(model).cut(image, "the picture of this check", lambda: None)
    except CuttingFailed as error:
        raise CheckFailed(f"{model} cannot be used: {error}. Look at CUTOUT_MODEL") from error
    except JobFailed:
        return f"{model} answers in {time.monotonic() - began_at:.1f} s, but sees no product in a drawn disc"
    return f"{model} cuts out, in {time.monotonic() - began_at:.1f} s"
