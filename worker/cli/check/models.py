"""Check the models: the image model, the slowest of the checks, and the one that cuts products out."""

import importlib.util
import time
from collections.abc import Callable, Mapping

from PIL import Image, ImageDraw

from config.images import ImageSettings
from config.model import DEFAULT_MODEL, ModelSettings
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

# Loads the models, draws with each and lets them go; returns facts by their names, raises `EngineError`.
Load = Callable[[ModelSettings], Mapping[str, ModelFacts]]


def check_model(settings: ModelSettings, load: Load) -> str:
    """Load the models and time a step of each. Headers come first: damage is found before gigabytes are read."""
    models = {name: settings.of_model(name) for name in settings.model_names}
    places = [f"MODELS {name}={own.model_id}" for name, own in models.items() if name != DEFAULT_MODEL]
    places.insert(0, f"MODEL_ID {settings.model_id}")
    for place, own in zip(places, models.values(), strict=True):
        try:
            found = identify(own.model_id, own.config_source, has_checker=own.safety_checker, vae_id=own.vae_id)
            weight_bytes(found, SINGLE_PRECISION_BYTES)
        except EngineError as error:
            raise CheckFailed(f"{error}. Look at {place}") from error
    try:
        facts = load(settings)
    except EngineError as error:
        raise CheckFailed(f"{error}. Look at {', '.join(places)}, DEVICE and DTYPE") from error
    described = [_describe(facts[DEFAULT_MODEL])]
    described += [f"{name} is {_describe(facts[name])}" for name in settings.model_names if name != DEFAULT_MODEL]
    return "; ".join(described)


def _describe(facts: ModelFacts) -> str:
    step = f"one step of {facts.base_size}x{facts.base_size} takes {facts.step_seconds:.3f} s"
    return f"{facts.model} on {facts.device} as {facts.dtype}: loaded in {facts.load_seconds:.1f} s, {step}"


def load_in_own_process(settings: ModelSettings) -> Mapping[str, ModelFacts]:
    """Load the models in a process of their own, as the worker does."""
    engine = EngineProcess(settings, log_level="ERROR", on_restart=lambda: None)
    engine.start()
    try:
        wait_until_ready(engine, LOAD_TIMEOUT_SECONDS)
    finally:
        engine.close()
    return engine.facts_by_model


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
