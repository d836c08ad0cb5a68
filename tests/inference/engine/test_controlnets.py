"""Pictures that follow a control: plain diffusers' own, alone and in batches with others."""

import gc
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from config.model import ModelSettings
from inference.checkpoints.offload import offload_in_turns
from inference.controlnet.files import find_controlnets, most_bytes
from inference.controlnet.guide import find_edges
from inference.errors import EngineFault, EngineStartFailed, RequestFailed
from inference.models.base import Family
from inference.models.loader import load_family
from inference.request import AdapterFile, GenerationRequest, Source
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import (
    PATIENCE_SECONDS,
    EngineCall,
    WatchedEngine,
    WatchedModel,
    submit_together,
)
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr, settings_of
from tests.support.long import long
from tests.support.models.family_models import FamilyModels
from tests.support.models.plain_families import alone
from tests.support.models.tiny_adapters import Z_IMAGE_EVERY_LAYER
from tests.support.models.tiny_controls import control_of, plainly_controlled, speckles, square, write_controlnet
from tests.support.models.tiny_models import (
    EVERY_LAYER,
    build_tiny_sd,
    build_tiny_sd_inpaint,
    build_tiny_sdxl,
    build_tiny_z_image,
    load_pipe,
    write_adapter,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

# Another batch adds up in another order, and that is all it may do.
SAME_DB = 60.0

BUILD = {
    "sd": build_tiny_sd,
    "sd_inpaint": build_tiny_sd_inpaint,
    "sdxl": build_tiny_sdxl,
    "z_image": build_tiny_z_image,
}


class Models(FamilyModels):
    """A checkpoint of each family with two ControlNets."""

    builders = BUILD

    def controlnet(self, family: str, name: str) -> Path:
        # One for a checkpoint that reads a mask is the same: it is shown latents alone.
        family = family.removesuffix("_inpaint")
        path = self._folder / f"{family}-{name}"
        if not path.is_dir():
            # Z-Image's first ControlNets read less, and refined nothing.
            first = {"control_in_dim": 16, "add_control_noise_refiner": None}
            config = first if (family, name) == ("z_image", "depth") else {}
            write_controlnet(path, load_pipe(self.checkpoint(family)), seed=len(name), **config)
        return path

    def settings_for(self, name: str) -> dict[str, str]:
        return {"CONTROLNETS": ",".join(f"{control}={self.controlnet(name, control)}" for control in ("pose", "depth"))}

    def plain(self, family: str, request: GenerationRequest) -> Any:
        """Draw the request alone with plain diffusers."""
        if request.control is None:
            return alone(self.checkpoint(family), request)
        folder = self.controlnet(family, request.control.model)
        return plainly_controlled(self.checkpoint(family), folder, request, image_for(request))

    def assert_right(self, family: str, calls: Sequence[EngineCall]) -> None:
        """Assert that every image is the one that plain diffusers draws for its request alone."""
        # All of them first: while diffusers loads a pipeline, no other thread of the process may load a model.
        drawn = [call.image for call in calls]
        ratios = [psnr(one, self.plain(family, call.request)) for one, call in zip(drawn, calls, strict=True)]
        assert min(ratios) >= MIN_PSNR_DB, ratios


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def image_for(request: GenerationRequest) -> Image.Image:
    """Return the control image of the request."""
    assert request.control is not None
    return Image.frombytes("RGB", (request.width, request.height), request.control.rgb)


def controlled_request(model: str = "pose", *adapters: AdapterFile, **fields: Any) -> GenerationRequest:
    """Build a short request in the tiny checkpoints' native size, with a control of these fields."""
    control = {name: fields.pop(name) for name in ("scale", "start", "end") if name in fields}
    made = request_of(**{"width": 64, "height": 64, "num_inference_steps": 3, "adapters": adapters} | fields)
    image = speckles(len(model), size=(made.width, made.height))
    return replace(made, control=control_of(model, image, **control))


# --- Alone


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("sd", {"scheduler": "euler_a", "width": 96, "start": 0.2, "num_inference_steps": 4}),
        pytest.param("sd", {"scheduler": "heun", "end": 0.5, "num_inference_steps": 4}, marks=long),
        # The others' batches below are held against plain diffusers too.
        pytest.param("sdxl", {"negative_prompt": "", "end": 0.8, "num_inference_steps": 4}, marks=long),
        pytest.param("z_image", {"guidance_scale": 2.0, "scale": 0.75, "width": 48}, marks=long),
    ],
)
def test_a_controlled_image_equals_plain_diffusers(models: Models, family: str, fields: dict[str, Any]) -> None:
    request = controlled_request(**fields)
    engine = models.engine(family)

    drawn = draw(engine, request)[0]

    assert psnr(drawn, models.plain(family, request)) >= MIN_PSNR_DB
    assert psnr(drawn, draw(engine, replace(request, control=None))[0]) < DIFFERENT_DB


@pytest.mark.parametrize(
    ("family", "mask"), [("sd", None), ("sd_inpaint", b"\x00\xff" * 32)], ids=["image2image", "inpaint"]
)
def test_control_guides_the_steps_of_image_to_image(models: Models, family: str, mask: bytes | None) -> None:
    source = Source(speckles(7).tobytes(), 0.8, None if mask is None else mask * 64)
    # Of the four steps that are taken, the third alone: of six it would be two others.
    request = controlled_request(start=0.3, end=0.8, scale=2.0, num_inference_steps=6, scheduler="ddim", source=source)
    engine = models.engine(family)

    drawn = draw(engine, request)[0]

    assert psnr(drawn, models.plain(family, request)) >= MIN_PSNR_DB
    assert psnr(drawn, draw(engine, replace(request, control=None))[0]) < DIFFERENT_DB


# --- Together


@pytest.fixture(scope="module")
def style(models: Models, tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    """Write an adapter of every layer of the UNet and its text encoder."""
    path = tmp_path_factory.mktemp("adapters") / "style.safetensors"
    pipe = load_pipe(models.checkpoint("sd"))
    write_adapter(path, pipe, layout="diffusers_new", rank=6, targets=EVERY_LAYER, text_encoder=True)
    return AdapterFile(path, None, 0.8)


@pytest.mark.gpu
def test_lanes_with_two_controls_and_without_share_forwards_and_each_is_right(
    models: Models, style: AdapterFile
) -> None:
    engine = models.engine("sd")

    calls = submit_together(
        engine,
        [
            controlled_request("pose", style, seeds=(1,)),
            controlled_request("depth", guidance_scale=1.0, seeds=(2,), scheduler="euler_a"),
            controlled_request("pose", start=0.4, end=0.8, scale=0.7, seeds=(3,), num_inference_steps=5),
            replace(controlled_request("pose", style, seeds=(4,)), control=None),
            replace(controlled_request("pose", guidance_scale=1.0, seeds=(5,)), control=None),
        ],
    )

    models.assert_right("sd", calls)
    together = [{lane.owner.request.seeds[0] for lane in batch} for batch in engine.model.batches]
    assert {1, 2, 3, 4, 5} in together
    different = replace(calls[0].request, control=calls[1].request.control)
    assert psnr(calls[0].image, draw(engine, different)[0]) < DIFFERENT_DB


def test_prompts_of_all_lengths_share_forwards_under_a_control(models: Models) -> None:
    engine = models.engine("sd")
    requests = [
        controlled_request(prompt="a red fox on a green hill looks far over the sea " * 3, seeds=(1,)),
        controlled_request(seeds=(2,)),
    ]
    alone_in_the_engine = [draw(engine, request)[0] for request in requests]

    calls = submit_together(engine, requests)

    assert min(psnr(call.image, one) for call, one in zip(calls, alone_in_the_engine, strict=True)) >= SAME_DB


def test_an_sdxl_batch_gives_each_lane_its_own_control(models: Models) -> None:
    requests = [
        controlled_request("depth", seeds=(1,), guidance_scale=1.0, num_inference_steps=2),
        controlled_request("pose", seeds=(2,), num_inference_steps=2),
    ]

    calls = submit_together(models.engine("sdxl"), requests)

    models.assert_right("sdxl", calls)


def test_a_z_image_batch_of_other_shapes_and_lengths_gives_each_lane_its_own_control(
    models: Models, tmp_path: Path
) -> None:
    write_adapter(
        tmp_path / "style.safetensors",
        load_pipe(models.checkpoint("z_image")),
        layout="diffusers_new",
        targets=Z_IMAGE_EVERY_LAYER,
    )
    style = AdapterFile(tmp_path / "style.safetensors", None, 1.0)
    engine = models.engine("z_image")

    calls = submit_together(
        engine,
        [
            controlled_request("depth", style, seeds=(1,), guidance_scale=0.0),
            controlled_request("pose", seeds=(2,), guidance_scale=1.5, width=80, height=48, prompt="a fox " * 9),
            replace(controlled_request("pose", style, seeds=(3,), guidance_scale=0.0), control=None),
            controlled_request("pose", style, seeds=(4,), guidance_scale=2.0, scale=0.5),
        ],
    )

    models.assert_right("z_image", calls)
    together = [{lane.owner.request.seeds[0] for lane in batch} for batch in engine.model.batches]
    assert {1, 2, 3, 4} in together


def test_denoiser_without_a_controlled_lane_gets_no_residuals(models: Models) -> None:
    engine = models.engine("sd")
    given: list[bool] = []

    def note(_unet: Any, _args: Any, inputs: dict[str, Any]) -> None:
        given.append("mid_block_additional_residual" in inputs)

    handle = engine.model._pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    draw(engine, controlled_request(start=0.4, end=0.8, num_inference_steps=5))
    handle.remove()

    assert given == [False, False, True, True, False]


class TurningEngine(WatchedEngine):
    """Its models take turns on the device. `seated`: which has its turn when a ControlNet runs."""

    def _load(self, settings: ModelSettings, device: torch.device, dtype: torch.dtype) -> Family:
        model = super()._load(settings, device, dtype)
        offload_in_turns(model._pipeline, device)
        self.seated: list[str] = []
        slot = model._pipeline.transformer._hf_hook._slot
        load = model.load_control

        def load_watched(name: str) -> Any:
            net = load(name)
            net.register_forward_pre_hook(lambda *_: self.seated.append(type(slot._taken_by).__name__))
            return net

        model.load_control = load_watched  # type: ignore[method-assign]
        return model


def test_a_z_image_controlnet_finds_the_transformer_on_the_device_where_models_take_turns(models: Models) -> None:
    named = f"pose={models.controlnet('z_image', 'pose')}"
    engine = TurningEngine(models.checkpoint("z_image"), CONTROLNETS=named)

    models.assert_right("z_image", [EngineCall(engine, controlled_request("pose", num_inference_steps=2))])
    engine.close()

    assert set(engine.seated) == {"ZImageTransformer2DModel"}


# --- Coming and going


class SmallEngine(WatchedEngine):
    """With memory for one of the two ControlNets."""

    def __init__(self, models: Models, **variables: Any) -> None:
        named = [f"{name}={models.controlnet('sd', name)}" for name in ("pose", "depth")]
        (only,) = find_controlnets({"pose": str(models.controlnet("sd", "pose"))}).values()
        super().__init__(
            models.checkpoint("sd"),
            CONTROLNETS=",".join(named),
            CONTROLNET_MEMORY_GB=1.5 * only.num_bytes(4) / 1e9,
            **variables,
        )


def controlnets_alive() -> int:
    """Count the ControlNets in memory, without garbage collection, which would be late."""
    return sum(type(one) is ControlNetModel for one in gc.get_objects())


def test_controlnet_without_room_waits_for_another_s_lanes_to_end(models: Models) -> None:
    engine = SmallEngine(models)

    calls = submit_together(
        engine,
        [
            controlled_request("pose", seeds=(1,)),
            controlled_request("depth", seeds=(2,)),
            controlled_request("pose", seeds=(3,)),
        ],
    )

    models.assert_right("sd", calls)
    together = [{lane.owner.request.seeds[0] for lane in batch} for batch in engine.model.batches]
    assert {1} in together
    assert not any({1, 2} <= seeds or {2, 3} <= seeds for seeds in together)
    assert not any(3 in seeds for seeds in together[: together.index({2})]), "it came after one that waits"
    engine.close()


def test_request_refused_for_another_reason_waits_for_no_room(models: Models) -> None:
    engine = SmallEngine(models)
    refused: list[EngineCall] = []
    is_answered: list[bool] = []

    def come() -> None:
        refused.append(EngineCall(engine, controlled_request("depth", scheduler="none such")))

    acts = {1: come, 2: engine.wait_until_prepared, 4: lambda: is_answered.append(refused[0].future.done())}
    runner = EngineCall(engine, controlled_request("pose", num_inference_steps=5), at=acts)

    assert runner.image.size == (64, 64)
    assert is_answered == [True]
    assert isinstance(refused[0].error, RequestFailed)
    engine.close()


def test_evicted_controlnet_frees_its_memory(models: Models) -> None:
    engine = SmallEngine(models)
    gc.collect()
    before = controlnets_alive()

    alive = []
    gc.disable()
    for model in ("pose", "depth", "pose"):
        draw(engine, controlled_request(model, num_inference_steps=2))
        alive.append(controlnets_alive() - before)
    gc.enable()

    assert alive == [1, 1, 1]
    engine.close()


@long
def test_other_lanes_go_on_while_a_controlnet_is_loaded(models: Models) -> None:
    engine = SmallEngine(models)
    may_load = threading.Event()
    waiting: list[EngineCall] = []
    steps_meanwhile: list[int] = []

    def come() -> None:
        engine.hold_preparing_until(may_load)
        waiting.append(EngineCall(engine, controlled_request("depth", seeds=(2,))))

    def let_load() -> None:
        steps_meanwhile.append(len(waiting[0].steps))
        may_load.set()

    runner = EngineCall(
        engine, replace(controlled_request(num_inference_steps=5), control=None), at={1: come, 4: let_load}
    )

    assert runner.image.size == (64, 64)
    assert steps_meanwhile == [0]
    models.assert_right("sd", waiting)
    engine.close()


class SlowModel(WatchedModel):
    """Loads ControlNets when it is let."""

    is_loading, may_load = threading.Event(), threading.Event()

    def load_control(self, name: str) -> Any:
        self.is_loading.set()
        assert self.may_load.wait(PATIENCE_SECONDS)
        return super().load_control(name)


def test_other_requests_begin_and_end_while_a_controlnet_is_loaded(models: Models) -> None:
    engine = WatchedEngine(models.checkpoint("sd"), SlowModel, CONTROLNETS=f"pose={models.controlnet('sd', 'pose')}")

    waiting = EngineCall(engine, controlled_request("pose"))
    assert SlowModel.is_loading.wait(PATIENCE_SECONDS)
    try:
        other = EngineCall(engine, replace(controlled_request("pose"), control=None))
        assert len(other.future.result(PATIENCE_SECONDS / 4).images) == 1
        assert waiting.steps == []
    finally:
        SlowModel.may_load.set()

    models.assert_right("sd", [waiting])
    engine.close()


def test_controlnet_that_fails_to_load_fails_its_own_job_and_is_tried_again(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.controlnet("sd", "pose"), tmp_path / "pose")
    engine = WatchedEngine(models.checkpoint("sd"), CONTROLNETS=f"pose={folder}")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "elsewhere")

    failed, other = submit_together(
        engine, [controlled_request("pose"), replace(controlled_request("pose"), control=None)]
    )
    assert isinstance(failed.error, EngineFault)
    assert "CONTROLNETS pose=" in str(failed.error)
    assert other.image.size == (64, 64)

    (tmp_path / "elsewhere").rename(weights)
    again = EngineCall(engine, controlled_request("pose"))

    models.assert_right("sd", [again])
    engine.close()


class FullModel(WatchedModel):
    """No memory for a ControlNet, as often as `num_failures` says."""

    num_failures = 0

    def load_control(self, name: str) -> Any:
        if self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().load_control(name)


def test_controlnet_without_memory_is_loaded_once_there_is_some_or_fails_by_its_name(
    models: Models,
) -> None:
    engine = WatchedEngine(models.checkpoint("sd"), FullModel, CONTROLNETS=f"pose={models.controlnet('sd', 'pose')}")
    model = engine.model
    assert isinstance(model, FullModel)
    other = replace(controlled_request("pose"), control=None)

    model.num_failures = 1_000_000
    failed, beside = submit_together(engine, [controlled_request("pose"), other])
    assert isinstance(failed.error, RequestFailed)
    model.num_failures = 1
    drawn = EngineCall(engine, controlled_request("pose"))

    assert failed.error.code == "GPU_OOM"
    assert "the ControlNet 'pose'" in str(failed.error)
    assert "lower ADAPTER_MEMORY_GB or CONTROLNET_MEMORY_GB" in str(failed.error)
    assert beside.image.size == (64, 64)
    models.assert_right("sd", [drawn])
    engine.close()


# --- What is refused


def test_control_model_that_is_not_configured_is_refused_by_name(models: Models) -> None:
    call = EngineCall(models.engine("sd"), controlled_request("canny"))

    assert isinstance(call.error, RequestFailed)
    assert call.error.code == "UNSUPPORTED_BY_MODEL"
    assert str(call.error) == "control model 'canny' is not known; this worker has pose, depth"
    assert call.steps == []


def test_engine_facts_list_its_controls(models: Models) -> None:
    assert models.engine("sd").facts.controls == ("pose", "depth")


def refusal(models: Models, source: Path | str, **variables: Any) -> str:
    """Return why the Stable Diffusion engine does not start with this ControlNet."""
    settings = settings_of(models.checkpoint("sd"), CONTROLNETS=f"canny={source}", **variables)
    with pytest.raises(EngineStartFailed) as caught:
        load_family(settings, device=torch.device("cpu"), dtype=torch.float32)
    assert f"canny={source}" in str(caught.value) or f"{source!r}" in str(caught.value)
    assert "CONTROLNETS" in str(caught.value)
    return str(caught.value)


def test_folder_without_a_controlnet_is_refused_at_start(models: Models, tmp_path: Path) -> None:
    assert "no folder here, and no hub id" in refusal(models, tmp_path / "nowhere")
    assert "without config.json" in refusal(models, tmp_path)
    assert "holds a UNet2DConditionModel" in refusal(models, models.checkpoint("sd") / "unet")
    assert "the hub cannot be reached" in refusal(models, "somebody/controlnet")


def test_a_controlnet_of_another_model_is_refused_at_start(models: Models, tmp_path: Path) -> None:
    pipe = load_pipe(models.checkpoint("sd"))

    assert "its cross_attention_dim is 80, the UNet's is 32" in refusal(models, models.controlnet("sdxl", "pose"))
    pooled = write_controlnet(tmp_path / "pooled", pipe, global_pool_conditions=True)
    assert "reads it as a whole" in refusal(models, pooled)


def test_a_damaged_controlnet_is_refused_at_start(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.controlnet("sd", "pose"), tmp_path / "pose")
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    text = config.read_text()

    config.write_text(json.dumps(json.loads(text) | {"conditioning_embedding_out_channels": [4, 4, 4, 4]}))
    assert "its config and its weights do not belong together" in refusal(models, folder)
    config.write_text(json.dumps(json.loads(text) | {"down_block_types": ["NoSuchBlock"] * 3}))
    assert "its config describes no model" in refusal(models, folder)
    config.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "cut off" in refusal(models, folder)
    weights.rename(folder / "diffusion_pytorch_model.bin")
    assert "is a pickle, which is never opened" in refusal(models, folder)


def test_a_controlnet_over_the_memory_s_limit_is_refused_at_start(models: Models) -> None:
    message = refusal(models, models.controlnet("sd", "pose"), CONTROLNET_MEMORY_GB=0.0001)

    assert "CONTROLNET_MEMORY_GB is 0.00" in message


def test_the_memory_that_is_kept_for_controlnets_is_what_all_take_or_the_limit(models: Models) -> None:
    found = find_controlnets({name: str(models.controlnet("sd", name)) for name in ("pose", "depth")})
    each = found["pose"].num_bytes(4)

    assert [most_bytes(found, 4, limit) for limit in (each, 10 * each)] == [each, 2 * each]
    assert most_bytes(found, 2, 10 * each) == each


def test_check_reports_the_memory_for_controlnets(models: Models) -> None:
    from worker.cli.check.machine import check_memory  # it brings what a GPU machine may not have

    named = f"pose={models.controlnet('sd', 'pose')},depth={models.controlnet('sd', 'depth')}"

    assert "GB kept for ControlNets" in check_memory(settings_of(models.checkpoint("sd"), CONTROLNETS=named))
    assert "ControlNets" not in check_memory(settings_of(models.checkpoint("sd")))


# --- Edges


def test_the_edges_of_a_square_are_its_outline() -> None:
    edges = find_edges(np.asarray(square(20, 12, 24)))

    assert edges.shape == (64, 64, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert (edges == edges[:, :, :1]).all()
    rows, columns = np.nonzero(edges[:, :, 0])
    near = {
        min(abs(row - 12), abs(row - 35), abs(column - 20), abs(column - 43))
        for row, column in zip(rows, columns, strict=True)
    }
    assert near <= {0, 1}
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((12, 35, 20, 43), abs=1)
    assert len(rows) == pytest.approx(4 * 24, abs=8)


def test_a_control_that_finds_edges_shows_them_to_the_controlnet(models: Models) -> None:
    request = controlled_request()
    drawn_on = square(16, 16, 30)
    assert request.control is not None
    control = replace(request.control, rgb=drawn_on.tobytes(), finds_edges=True)

    drawn = draw(models.engine("sd"), replace(request, control=control))[0]

    outline = Image.fromarray(find_edges(np.asarray(drawn_on)))
    shown = control_of("pose", outline)
    assert psnr(drawn, models.plain("sd", replace(request, control=shown))) >= MIN_PSNR_DB
