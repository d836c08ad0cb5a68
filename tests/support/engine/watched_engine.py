"""The engine with recorders, for tests of its loop: its calls of the model, its turns, and steps to act at."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.lane import Embedding, Lane
from inference.lora.products.rows import RowAdapters
from inference.models.base import Family
from inference.models.inputs import Prompt
from inference.request import EngineLoad, GenerationRequest, GenerationResult, StepReport
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import images_of, settings_of

# Far above what any test waits for; below the suite's own limit, so that the failure says where it hung.
PATIENCE_SECONDS = 300.0


class WatchedModel(Family):
    """Laid over whatever family was loaded: records its calls. `batches`: the lanes of every forward tried."""

    batches: list[list[Lane]]
    encoded: list[str]

    def encode(self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters]) -> list[Embedding]:
        self.encoded += [prompt.text for prompt in prompts]
        return super().encode(prompts, adapters)  # type: ignore[safe-super]

    def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
        self.batches.append(list(lanes))
        return super().denoise(lanes)  # type: ignore[safe-super]


def laid_over(model: Family, window: type[WatchedModel]) -> WatchedModel:
    """Put the window's methods before the loaded model's own, in place."""
    model.__class__ = type(window.__name__, (window, type(model)), {})
    assert isinstance(model, window)
    model.batches, model.encoded = [], []
    return model


class WatchedEngine(LocalEngine):
    """The engine over a watched model. `turns`: its load after each turn of its loop."""

    def __init__(self, checkpoint: Path, model: type[WatchedModel] = WatchedModel, **variables: Any) -> None:
        self._window = model
        self.turns: list[EngineLoad] = []
        super().__init__(settings_of(checkpoint, **variables), self.turns.append)
        # Without the warm-up.
        self.model.batches.clear()
        self.model.encoded.clear()

    def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
        self.model = laid_over(super()._load(settings, device, dtype), self._window)
        return self.model

    @property
    def is_prepared(self) -> bool:
        """Is all done that was asked of the preparing thread? To be asked on the engine's thread."""
        asked: list[Future[Any]] = []
        for active in self.default.loop._requests:
            asked += [active.scheduling, *active.readings.values()]
            asked += self.default.loop._admission._controls.needs(active) or []
        return all(one.done() for one in asked)

    def hold_preparing_until(self, is_over: threading.Event) -> None:
        """Keep the preparing thread busy."""
        self.default.loop._admission._preparer.submit(lambda: is_over.wait(PATIENCE_SECONDS))

    def wait_until_prepared(self) -> None:
        """Hold the engine's thread, which is the one to call this."""
        wait_for(lambda: self.is_prepared)

    def lose_the_device(self) -> None:
        """Lose the device for good: a "meta" tensor has a shape and no values."""
        self.default.loop._device._device = torch.device("meta")


class EngineCall:
    """A request handed to the engine, and what comes of it. `at` acts on the engine's thread after a step."""

    def __init__(
        self,
        engine: WatchedEngine,
        request: GenerationRequest,
        at: Mapping[int, Callable[[], object]] | None = None,
    ) -> None:
        self.request = request
        self.steps: list[StepReport] = []
        self.is_cancelled = False
        self._at = at or {}
        self.future: Future[GenerationResult] = engine.generate(request, self._on_step, lambda: self.is_cancelled)

    def _on_step(self, report: StepReport) -> None:
        self.steps.append(report)
        self._at.get(report.step_index, lambda: None)()

    def cancel(self) -> None:
        """Cancel as the worker does: by the flag that the engine reads, not by the future."""
        self.is_cancelled = True

    @cached_property
    def images(self) -> list[Image.Image]:
        return images_of(self.future.result(PATIENCE_SECONDS))

    @property
    def image(self) -> Image.Image:
        (image,) = self.images
        return image

    @property
    def error(self) -> BaseException | None:
        return self.future.exception(PATIENCE_SECONDS)


@contextmanager
def arriving_together(engine: WatchedEngine) -> Iterator[None]:
    """Hand in requests inside: they begin at one and the same turn, as many as there are lanes and slots for.

    One more request, of three steps, holds the engine's threads until everything is there, and prepared: it shares the
    others' first step.
    """
    is_held, everything_is_in, everything_is_asked_for = (threading.Event() for _ in range(3))

    def hold() -> None:
        engine.hold_preparing_until(everything_is_asked_for)
        is_held.set()
        everything_is_in.wait(PATIENCE_SECONDS)

    def let_go() -> None:
        everything_is_asked_for.set()
        engine.wait_until_prepared()

    usher = request_of(request_id="usher", width=64, height=64, num_inference_steps=3)
    EngineCall(engine, usher, at={0: hold, 2: let_go})
    assert is_held.wait(PATIENCE_SECONDS)
    try:
        yield
    finally:
        everything_is_in.set()


def submit_together(engine: WatchedEngine, requests: Sequence[GenerationRequest]) -> list[EngineCall]:
    """Hand in all of them at once, see above."""
    with arriving_together(engine):
        return [EngineCall(engine, request) for request in requests]


def wait_for(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.001)
