"""The model: are its files whole, does it load, does it draw? The slowest of the checks."""

from collections.abc import Callable

from config.model import ModelSettings
from inference.checkpoints.checkpoint import identify, weight_bytes
from inference.errors import EngineError
from inference.process.engine_process import EngineProcess, wait_until_ready
from inference.request import ModelFacts
from worker.cli.check.checks import CheckFailed

LOAD_TIMEOUT_SECONDS = 900.0
SINGLE_PRECISION_BYTES = 4

# Loads the model, draws with it and lets it go; raises `EngineError`.
Load = Callable[[ModelSettings], ModelFacts]


def check_model(settings: ModelSettings, load: Load) -> str:
    """Read every file's header first: what is cut off or missing is known before gigabytes are read."""
    try:
        found = identify(settings.model_id, settings.config_source, has_checker=settings.safety_checker)
        weight_bytes(found, SINGLE_PRECISION_BYTES)
        facts = load(settings)
    except EngineError as error:
        raise CheckFailed(f"{error}. Look at MODEL_ID {settings.model_id}, DEVICE and DTYPE") from error
    step = f"one step of {facts.base_size}x{facts.base_size} takes {facts.step_seconds:.3f} s"
    return f"{facts.model} on {facts.device} as {facts.dtype}: loaded in {facts.load_seconds:.1f} s, {step}"


def load_in_own_process(settings: ModelSettings) -> ModelFacts:
    """As the worker does it."""
    engine = EngineProcess(settings, log_level="ERROR", on_restart=lambda: None)
    engine.start()
    try:
        wait_until_ready(engine, LOAD_TIMEOUT_SECONDS)
    finally:
        engine.close()
    assert engine.facts is not None, "a ready engine has facts"  # noqa: S101
    return engine.facts
