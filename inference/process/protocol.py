"""The messages between the supervisor and the engine's process, one dataclass each, over one socket pair."""

from collections.abc import Mapping
from dataclasses import dataclass

from config.logs import LogFormat
from config.model import ModelSettings
from inference.errors import EngineError
from inference.request import EngineLoad, GenerationRequest, GenerationResult, ModelFacts, StepReport


@dataclass(frozen=True, slots=True)
class Start:
    """First message to the child: the model to load."""

    settings: ModelSettings
    log_level: str
    log_format: LogFormat = "auto"


@dataclass(frozen=True, slots=True)
class Generate:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Last message to an idle child: exit."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The models are loaded: facts of each by its name."""

    facts: Mapping[str, ModelFacts]


@dataclass(frozen=True, slots=True)
class StartFailed:
    message: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """One turn of the engine's loop: its step reports by request id, and the engine's load after it."""

    reports: tuple[tuple[str, StepReport], ...]
    engine_load: EngineLoad


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request. `num_bytes` of pixels of each picture follow, see `inference.process.pixels`."""

    request_id: str
    result: GenerationResult
    num_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: str
    error: EngineError


ToChild = Start | Generate | Cancel | Stop
FromChild = Ready | StartFailed | Stepped | Finished | Failed
