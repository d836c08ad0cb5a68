"""Pictures by the worker's own engine, for the grids, the score and the tests of the model."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from config.model import ModelSettings
from examples.demo_model.recipe.settings import SIDE, bar_seconds
from inference.engine.local_engine import LocalEngine
from inference.request import AdapterFile, GenerationRequest, GenerationResult

GUIDANCE = 3.0
PATIENCE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Wish:
    """A picture to be drawn; `adapter` is a file."""

    prompt: str
    adapter: Path | None = None
    num_steps: int = 20
    seed: int = 1


class Artist:
    """An engine that is wished for pictures."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def draw(self, wishes: Sequence[Wish], *, desc: str | None = None) -> list[npt.NDArray[np.uint8]]:
        """Draw RGB images, shape (SIDE, SIDE, 3), in the order of the wishes; they share the engine's batches."""
        futures = [self._order(number, wish) for number, wish in enumerate(wishes)]
        waiting = tqdm(futures, desc=desc, disable=desc is None, mininterval=bar_seconds())
        return [_pixels(future.result(PATIENCE_SECONDS)) for future in waiting]

    def _order(self, number: int, wish: Wish) -> Future[GenerationResult]:
        request = GenerationRequest(
            request_id=str(number),
            prompt=wish.prompt,
            negative_prompt="",
            width=SIDE,
            height=SIDE,
            num_inference_steps=wish.num_steps,
            guidance_scale=GUIDANCE,
            seeds=(wish.seed,),
            adapters=(AdapterFile(wish.adapter, None, 1.0),) if wish.adapter else (),
            arrived_at=float(number),
        )
        return self._engine.generate(request, lambda _: None, lambda: False)


@contextmanager
def artist_of(checkpoint: Path, device: str = "auto") -> Iterator[Artist]:
    """Build an artist over an engine of its own, as the worker would start it for this checkpoint."""
    engine = LocalEngine(ModelSettings.model_validate({"MODEL_ID": str(checkpoint), "DEVICE": device}))
    try:
        yield Artist(engine)
    finally:
        engine.close()


def _pixels(result: GenerationResult) -> npt.NDArray[np.uint8]:
    (image,) = result.images
    return np.frombuffer(image.rgb, np.uint8).reshape(image.height, image.width, 3)
