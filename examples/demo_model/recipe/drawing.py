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
class ImagePrompt:
    """A prompt with steps and seed; `adapter` is a file."""

    prompt: str
    adapter: Path | None = None
    num_steps: int = 20
    seed: int = 1


class ImageGenerator:
    """An engine that draws images of prompts."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def draw(self, prompts: Sequence[ImagePrompt], *, desc: str | None = None) -> list[npt.NDArray[np.uint8]]:
        """Draw RGB images, shape (SIDE, SIDE, 3), in the order of the prompts; they share the engine's batches."""
        futures = [self._submit(number, prompt) for number, prompt in enumerate(prompts)]
        waiting = tqdm(futures, desc=desc, disable=desc is None, mininterval=bar_seconds())
        return [_pixels(future.result(PATIENCE_SECONDS)) for future in waiting]

    def _submit(self, number: int, prompt: ImagePrompt) -> Future[GenerationResult]:
        request = GenerationRequest(
            request_id=str(number),
            prompt=prompt.prompt,
            negative_prompt="",
            width=SIDE,
            height=SIDE,
            num_inference_steps=prompt.num_steps,
            guidance_scale=GUIDANCE,
            seeds=(prompt.seed,),
            adapters=(AdapterFile(prompt.adapter, None, 1.0),) if prompt.adapter else (),
            arrived_at=float(number),
        )
        return self._engine.generate(request, lambda _: None, lambda: False)


@contextmanager
def generator_for(checkpoint: Path, device: str = "auto") -> Iterator[ImageGenerator]:
    """Build an generator over an engine of its own, as the worker would start it for this checkpoint."""
    engine = LocalEngine(ModelSettings.model_validate({"MODEL_ID": str(checkpoint), "DEVICE": device}))
    try:
        yield ImageGenerator(engine)
    finally:
        engine.close()


def _pixels(result: GenerationResult) -> npt.NDArray[np.uint8]:
    (image,) = result.images
    return np.frombuffer(image.rgb, np.uint8).reshape(image.height, image.width, 3)
