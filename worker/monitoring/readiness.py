"""Whether a worker takes jobs, and why not."""

from collections.abc import Callable
from dataclasses import dataclass

from inference.process.engine_process import EngineProcess, EngineState
from worker.amqp.consumer import Consumer
from worker.breakers import Breaker
from worker.results.address_breaker import AddressBreaker
from worker.results.image_metadata import ImageEncoder


@dataclass(slots=True)
class Readiness:
    """What the worker's parts say of it. `consumer` comes once the model is loaded."""

    engine: EngineProcess
    breakers: tuple[Breaker | AddressBreaker, ...]
    labeller: ImageEncoder
    is_stopping: Callable[[], bool]
    consumer: Consumer | None = None

    @property
    def is_connected(self) -> bool:
        return self.consumer is not None and self.consumer.is_connected

    @property
    def refusal(self) -> str:
        """Why no jobs are taken, where a part refuses this worker or would refuse its pictures."""
        reasons = (breaker.reason for breaker in self.breakers)
        return next(filter(None, reasons), "") or self.labeller.refusal

    def why_not(self) -> str:
        """Empty where the worker takes jobs."""
        if self.is_stopping():
            return "stopping"
        if self.engine.state is not EngineState.READY:
            return "the engine is loading the model"
        if not self.is_connected:
            return "the broker is not connected"
        return self.refusal
