"""Readiness of the worker: whether it takes jobs, and the reason if not."""

from collections.abc import Callable
from dataclasses import dataclass

from inference.process.engine_process import EngineProcess, EngineState
from worker.amqp.consumer import Consumer
from worker.breakers import Breaker
from worker.results.address_breaker import AddressBreaker
from worker.results.image_metadata import ImageEncoder

STOPPING = "stopping"
ENGINE_LOADING = "the engine is loading the model"


@dataclass(slots=True)
class Readiness:
    """The parts that readiness depends on. `consumer` is set once the model is loaded."""

    engine: EngineProcess
    breakers: tuple[Breaker | AddressBreaker, ...]
    image_encoder: ImageEncoder
    is_stopping: Callable[[], bool]
    consumer: Consumer | None = None

    @property
    def is_connected(self) -> bool:
        return self.consumer is not None and self.consumer.is_connected

    @property
    def refusal(self) -> str:
        """The reason of an open breaker or of the image encoder for taking no jobs; empty without one."""
        reasons = (breaker.reason for breaker in self.breakers)
        return next(filter(None, reasons), "") or self.image_encoder.refusal

    def why_not(self) -> str:
        """Return the reason why the worker takes no jobs; empty where it takes them."""
        if self.is_stopping():
            return STOPPING
        if self.engine.state is not EngineState.READY:
            return ENGINE_LOADING
        if not self.is_connected:
            return "the broker is not connected"
        return self.refusal
