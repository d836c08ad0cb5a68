"""The engine's pictures against plain diffusers', fp32 on a CPU: the same seed gives the same picture."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from inference.engine.local_engine import LocalEngine
from inference.errors import EngineStartFailed, RequestFailed
from inference.lane import Lane
from inference.request import AdapterFile, StepReport
from inference.sampling.schedulers import DIFFUSION
from tests.support.cuda.on_gpu import on_gpu
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, WatchedModel
from tests.support.images.parity import MIN_PSNR_DB, demo_adapter, draw, psnr, settings_of, solo
from tests.support.long import long_but
from tests.support.models.tiny_models import Layout, build_tiny_sd, load_pipe, write_adapter
from tests.support.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO_CHECKPOINT = DEMO_MODEL / "checkpoint"


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    """Start the engine on the demo model."""
    made = LocalEngine(settings_of(DEMO_CHECKPOINT))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny checkpoint with random weights."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_engine(tiny: Path) -> Iterator[LocalEngine]:
    made = LocalEngine(settings_of(tiny))
    yield made
    made.close()


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", long_but([1.0, 3.0], 3.0))
def test_an_image_without_an_adapter_equals_plain_diffusers(engine: LocalEngine, guidance: float) -> None:
    request = request_of(guidance_scale=guidance, num_inference_steps=4)

    assert psnr(draw(engine, request)[0], solo(DEMO_CHECKPOINT, request)) >= MIN_PSNR_DB


# Short, another checkpoint takes every one of them in `test_families.py`.
@pytest.mark.gpu
@pytest.mark.parametrize("name", long_but(DIFFUSION.makers, "euler_a"))
def test_every_scheduler_gives_the_image_plain_diffusers_gives_with_it(engine: LocalEngine, name: str) -> None:
    request = request_of(scheduler=name, num_inference_steps=4)

    assert psnr(draw(engine, request)[0], solo(DEMO_CHECKPOINT, request)) >= MIN_PSNR_DB


@pytest.mark.parametrize("scale", on_gpu(long_but([1.0, 0.5], 0.5), 0.5))
def test_an_image_with_a_diffusers_adapter_equals_plain_diffusers(engine: LocalEngine, scale: float) -> None:
    request = request_of(prompt="neon: a castle", adapters=(demo_adapter("neon", scale),), num_inference_steps=4)

    drawn = draw(engine, request)[0]

    assert psnr(drawn, solo(DEMO_CHECKPOINT, request)) >= MIN_PSNR_DB
    assert psnr(drawn, draw(engine, replace(request, adapters=()))[0]) < 25


@pytest.mark.parametrize(
    "layout", on_gpu(long_but(["diffusers_old", "diffusers_new"], "diffusers_new"), "diffusers_new")
)
def test_a_file_with_text_encoder_layers_equals_plain_diffusers(
    tiny: Path, tiny_engine: LocalEngine, tmp_path: Path, layout: Layout
) -> None:
    pipe = load_pipe(tiny)
    weights = write_adapter(tmp_path / "adapter.safetensors", pipe, layout=layout, rank=4, seed=1, text_encoder=True)
    request = request_of(width=64, height=64, num_inference_steps=4, adapters=(AdapterFile(weights, None, 1.0),))

    drawn = draw(tiny_engine, request)[0]

    assert psnr(drawn, solo(tiny, request)) >= MIN_PSNR_DB
    assert psnr(drawn, solo(tiny, replace(request, adapters=()))) < 35


@pytest.mark.gpu
def test_a_peft_folder_equals_peft_itself(tiny: Path, tiny_engine: LocalEngine, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "peft", load_pipe(tiny), layout="peft_folder", rank=4, alpha=8, seed=2)
    adapter = AdapterFile(folder / "adapter_model.safetensors", folder / "adapter_config.json", 1.0)
    request = request_of(width=64, height=64, num_inference_steps=4, adapters=(adapter,))

    drawn = draw(tiny_engine, request)[0]

    assert psnr(drawn, solo(tiny, request)) >= MIN_PSNR_DB
    assert psnr(drawn, solo(tiny, replace(request, adapters=()))) < 35


@pytest.mark.gpu
def test_two_adapters_at_their_scales_equal_plain_diffusers(engine: LocalEngine) -> None:
    request = request_of(adapters=(demo_adapter("neon", 0.7), demo_adapter("sepia", 0.4)), num_inference_steps=4)

    assert psnr(draw(engine, request)[0], solo(DEMO_CHECKPOINT, request)) >= MIN_PSNR_DB


def test_image_without_an_adapter_is_the_same_before_and_after_a_styled_one(engine: LocalEngine) -> None:
    request = request_of(num_inference_steps=3)

    before = draw(engine, request)[0]
    draw(engine, replace(request, adapters=(demo_adapter("blueprint"),)))
    after = draw(engine, request)[0]

    assert before.tobytes() == after.tobytes()


@pytest.mark.gpu
def test_several_seeds_give_what_each_gives_alone(engine: LocalEngine) -> None:
    request = request_of(seeds=(1, 2, 3), num_inference_steps=2)
    together = draw(engine, request)

    alone = [draw(engine, replace(request, seeds=(seed,)))[0] for seed in request.seeds]

    assert all(psnr(one, other) >= MIN_PSNR_DB for one, other in zip(together, alone, strict=True))
    assert psnr(together[0], together[1]) < MIN_PSNR_DB


def test_every_step_is_reported_in_order_from_zero(engine: LocalEngine) -> None:
    steps: list[StepReport] = []

    draw(engine, request_of(num_inference_steps=3, seeds=(1, 2)), steps)

    assert [step.step_index for step in steps] == list(range(4))
    assert {step.num_steps for step in steps} == {3}
    assert all(step.seconds > 0 for step in steps[1:])


def test_an_adapter_that_does_not_fit_fails_before_any_step_and_leaves_no_trace(
    engine: LocalEngine, tiny: Path, tmp_path: Path
) -> None:
    weights = write_adapter(tmp_path / "adapter.safetensors", load_pipe(tiny), layout="diffusers_new", rank=4, seed=3)
    steps: list[StepReport] = []
    unadapted = request_of(num_inference_steps=2)
    before = draw(engine, unadapted)[0]

    with pytest.raises(RequestFailed) as failure:
        draw(engine, replace(unadapted, adapters=(AdapterFile(weights, None, 1.0),)), steps)

    assert failure.value.code == "LORA_INCOMPATIBLE"
    assert steps == []
    assert draw(engine, unadapted)[0].tobytes() == before.tobytes()


def test_image_of_nan_is_never_returned(tiny: Path) -> None:
    class BrokenEngine(LocalEngine):
        def break_decoder(self) -> None:
            with torch.no_grad():
                self.default.family._pipeline.vae.decoder.conv_out.bias.fill_(math.nan)

    engine = BrokenEngine(settings_of(tiny))
    engine.break_decoder()

    with pytest.raises(RequestFailed) as failure:
        draw(engine, request_of(width=64, height=64))

    engine.close()
    assert failure.value.code == "OUTPUT_INVALID"


def test_running_out_of_memory_fails_the_request_and_the_next_one_runs(tiny: Path) -> None:
    class SmallModel(WatchedModel):
        is_full = False

        def denoise(self, lanes: Sequence[Lane]) -> list[torch.Tensor]:
            if self.is_full:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().denoise(lanes)

    engine = WatchedEngine(tiny, SmallModel)
    SmallModel.is_full = True
    with pytest.raises(RequestFailed) as failure:
        draw(engine, request_of(width=64, height=64, num_inference_steps=2))
    SmallModel.is_full = False

    assert failure.value.code == "GPU_OOM"
    assert "64x64" in str(failure.value)
    assert draw(engine, request_of(width=64, height=64, num_inference_steps=2))[0].size == (64, 64)
    engine.close()


def test_checkpoint_that_draws_nan_is_refused_at_the_start(tmp_path: Path) -> None:
    pipe = load_pipe(build_tiny_sd(tmp_path / "whole"))
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(math.nan)
    pipe.save_pretrained(tmp_path / "broken")

    with pytest.raises(EngineStartFailed, match="not numbers"):
        LocalEngine(settings_of(tmp_path / "broken"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_configured_gpu_that_is_missing_is_refused_at_the_start(tiny: Path) -> None:
    with pytest.raises(EngineStartFailed, match="CUDA_VISIBLE_DEVICES"):
        LocalEngine(settings_of(tiny, DEVICE="cuda"))


def test_a_checkpoint_of_another_family_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')

    with pytest.raises(EngineStartFailed, match="KolorsPipeline"):
        LocalEngine(settings_of(tmp_path))


def test_model_weights_have_the_configured_dtype(tiny: Path) -> None:
    engine = LocalEngine(settings_of(tiny, DTYPE="bfloat16"))

    request = request_of(width=64, height=64, num_inference_steps=4)
    drawn = draw(engine, request)[0]

    pipeline = engine.default.family._pipeline
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.bfloat16}
    assert engine.facts.dtype == "bfloat16"
    assert psnr(drawn, solo(tiny, request)) > 20
    engine.close()


def test_the_reference_is_the_plain_pipeline() -> None:
    assert type(load_pipe(DEMO_CHECKPOINT)) is StableDiffusionPipeline
