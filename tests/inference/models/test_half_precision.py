"""Every family in 16 bits against plain diffusers in the same dtype, which is handed the engine's fp32 noise."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.request import AdapterFile, GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import PATIENCE_SECONDS
from tests.support.images.parity import images_of, pipe_with, psnr
from tests.support.long import long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.plain_families import drawn_by, embeddings_by_compel
from tests.support.models.tiny_chroma import build_tiny_chroma
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_krea2 import build_tiny_krea2
from tests.support.models.tiny_models import (
    build_tiny_sd,
    build_tiny_sdxl,
    build_tiny_z_image,
    load_pipe,
    write_adapter,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread", "no_forward_failed")]

# Both sides round after each operation, but not after the same ones: the engine adds an adapter by other products and
# keeps latents in 32 bits between steps.
MIN_HALF_PSNR_DB = 30.0
# A lost adapter or another noise changes a picture by more than this beyond what rounding does.
CLEARLY_DB = 10.0
# Two hundred tokens: the tiny tokenizers make one of every letter.
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 3


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
    "flux": build_tiny_flux,
    "chroma": build_tiny_chroma,
    "flux_2": build_tiny_flux_2,
    "krea2": build_tiny_krea2,
}


class Models(FamilyModels):
    """A checkpoint for each family, and engines by family and dtype ("sd bfloat16")."""

    builders = FAMILIES

    def checkpoint(self, name: str) -> Path:
        return super().checkpoint(name.split(maxsplit=1)[0])

    def settings_for(self, name: str) -> dict[str, str]:
        return {"DTYPE": name.split()[1]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("family", "dtype"),
    long_but(
        [(family, dtype) for family in FAMILIES for dtype in ("bfloat16", "float16")],
        ("sd", "bfloat16"),
        ("z_image", "float16"),
        ("flux", "bfloat16"),
    ),
)
def test_a_batch_in_16_bits_equals_plain_diffusers_that_begins_with_the_same_noise(
    models: Models, tmp_path: Path, record_property: Callable[[str, object], None], family: str, dtype: str
) -> None:
    # Given a prompt of three chunks under an adapter, the same without it, and a short prompt
    name = f"{family} {dtype}"
    checkpoint = models.checkpoint(name)
    weights = write_adapter(
        tmp_path / "adapter.safetensors", load_pipe(checkpoint), layout="diffusers_new", rank=8, seed=1, strength=2.0
    )
    requests = [
        tiny_request(AdapterFile(weights, None, 0.7), prompt=LONG),
        tiny_request(prompt=LONG),
        tiny_request(seeds=(43,)),
    ]

    # When the engine draws them together
    engine = models.engine(name)
    futures = [engine.generate(request, lambda _: None, lambda: False) for request in requests]
    adapted, unadapted, short = [images_of(future.result(PATIENCE_SECONDS))[0] for future in futures]

    # Then each is what the pipeline draws alone, and what tells them apart shows
    ratios = [
        psnr(drawn, by_diffusers(checkpoint, dtype, request))
        for drawn, request in ((adapted, requests[0]), (short, requests[2]))
    ]
    record_property("psnr_db", round(min(ratios), 1))
    assert min(ratios) >= MIN_HALF_PSNR_DB
    assert psnr(adapted, unadapted) < min(ratios) - CLEARLY_DB


def tiny_request(*adapters: AdapterFile, **fields: Any) -> GenerationRequest:
    return request_of(**{"width": 64, "height": 64, "num_inference_steps": 2, "adapters": adapters} | fields)


def by_diffusers(checkpoint: Path, dtype: str, request: GenerationRequest) -> Any:
    pipe = pipe_with(checkpoint, *request.adapters, dtype=getattr(torch, dtype))
    is_long = request.prompt == LONG and hasattr(pipe, "unet")
    return drawn_by(pipe, request, **(embeddings_by_compel(pipe, request) if is_long else {}))
