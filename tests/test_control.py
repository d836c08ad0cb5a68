"""Pictures that follow a control: plain diffusers' own, alone and in batches with others."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference.request import AdapterFile, GenerationRequest
from tests.engine_requests import request_of
from tests.pictures import DIFFERENT_DB, MIN_PSNR_DB, draw, one_torch_thread, psnr
from tests.plain_families import alone
from tests.tiny_controls import control_of, plainly_controlled, speckles, write_controlnet
from tests.tiny_models import build_tiny_sd, build_tiny_sdxl, load_pipe
from tests.watched_engine import WatchedEngine

BUILD = {"sd": build_tiny_sd, "sdxl": build_tiny_sdxl}
PICTURE = speckles(1)


class Models:
    """A checkpoint of each family with two ControlNets, and an engine for each that a test asks for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: dict[str, WatchedEngine] = {}

    def checkpoint(self, family: str) -> Path:
        path = self._folder / family
        return path if path.is_dir() else BUILD[family](path)

    def controlnet(self, family: str, name: str) -> Path:
        path = self._folder / f"{family}-{name}"
        if not path.is_dir():
            write_controlnet(path, load_pipe(self.checkpoint(family)), seed=len(name))
        return path

    def engine(self, family: str) -> WatchedEngine:
        if family not in self._engines:
            named = [f"{name}={self.controlnet(family, name)}" for name in ("pose", "depth")]
            self._engines[family] = WatchedEngine(self.checkpoint(family), CONTROLNETS=",".join(named))
        return self._engines[family]

    def plain(self, family: str, request: GenerationRequest) -> Any:
        """What plain diffusers draws for the request alone."""
        if request.control is None:
            return alone(self.checkpoint(family), request)
        folder = self.controlnet(family, request.control.model)
        return plainly_controlled(self.checkpoint(family), folder, request, PICTURE)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def controlled_request(
    model: str = "pose", *, adapters: tuple[AdapterFile, ...] = (), **fields: Any
) -> GenerationRequest:
    """A short request in the tiny checkpoints' native size, with a control of these fields."""
    control = {name: fields.pop(name) for name in ("scale", "start", "end") if name in fields}
    made = {"width": 64, "height": 64, "num_inference_steps": 6, "adapters": adapters} | fields
    return request_of(control=control_of(model, PICTURE, **control), **made)


# --- Alone


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"scale": 0.4, "negative_prompt": ""},
        {"start": 0.2, "end": 0.7, "num_inference_steps": 8},
        {"end": 0.5, "scheduler": "heun"},
        {"scheduler": "euler_a", "width": 96},
    ],
)
def test_a_controlled_picture_equals_plain_diffusers(models: Models, family: str, fields: dict[str, Any]) -> None:
    request = controlled_request(**fields)
    engine = models.engine(family)

    drawn = draw(engine, request)[0]
    without = draw(engine, replace(request, control=None))[0]

    print(family, fields, psnr(drawn, models.plain(family, request)), psnr(drawn, without))
    assert psnr(drawn, models.plain(family, request)) >= MIN_PSNR_DB
    assert psnr(drawn, without) < DIFFERENT_DB
