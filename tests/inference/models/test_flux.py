"""FLUX.1 against plain diffusers, fp32 on a CPU: text to image alone and in mixed batches, and what it refuses."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from inference.errors import EngineStartFailed, RequestFailed
from inference.models.attention.flux import GroupedFluxAttnProcessor
from inference.request import AdapterFile, GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import EngineCall, WatchedEngine, submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.flux_adapters import (
    FLUX_EVERY_LAYER,
    published_layers,
    random_pairs,
    write_pairs,
    xlabs_layers,
)
from tests.support.models.plain_families import FLOW_CHOICES, alone
from tests.support.models.tiny_controls import write_controlnet
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_models import Layout, build_tiny_sd, load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "dev": build_tiny_flux,
    "schnell": lambda folder: build_tiny_flux(folder, seed=1, is_schnell=True),
    "sd": build_tiny_sd,
}
# What differs by no more is the same but for rounding.
SAME_DB = 60.0
# Both text encoders' tokenizers make a token of every letter: CLIP reads the beginning of it.
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 3
TRUE_CFG: dict[str, Any] = {"true_cfg_scale": 3.0, "negative_prompt": "dark and dull"}

LORA_DOWN = ("lora_down", "lora_up")


class Models(FamilyModels):
    """The checkpoints of this file."""

    builders = CHECKPOINTS

    def assert_equal(self, name: str, request: GenerationRequest) -> None:
        """Assert that alone in the engine the request gives the image that plain diffusers draws."""
        drawn = draw(self.engine(name), request)[0]
        assert psnr(drawn, alone(self.checkpoint(name), request)) >= SAME_DB

    def psnr_after(self, name: str, request: GenerationRequest, **changes: Any) -> float:
        """Return how close the engine's image with other values is."""
        return psnr(*(draw(self.engine(name), one)[0] for one in (request, replace(request, **changes))))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def tiny_request(**fields: Any) -> GenerationRequest:
    """Build a short request in the tiny checkpoints' native size, with the guidance of dev."""
    usual = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 3.5, "negative_prompt": ""}
    return request_of(**usual | fields)


def test_steps_and_guidance_default_to_those_of_the_checkpoint(models: Models) -> None:
    facts = [models.engine(name).facts for name in ("dev", "schnell")]

    assert [(one.family, one.default_steps, one.default_guidance) for one in facts] == [
        ("flux", 28, 3.5),
        ("flux", 4, 0.0),
    ]
    assert [(one.base_size, one.size_multiple) for one in facts] == [(64, 16)] * 2


# --- Alone


@pytest.mark.parametrize(
    ("name", "fields"),
    long_but(
        [(name, fields) for name in ("dev", "schnell") for fields in ({}, TRUE_CFG)],
        ("dev", {}),
        ("dev", TRUE_CFG),
        ("schnell", {}),
    ),
    ids=str,
)
def test_an_image_equals_plain_diffusers(models: Models, name: str, fields: dict[str, Any]) -> None:
    models.assert_equal(name, tiny_request(**fields))


@pytest.mark.parametrize(("width", "height"), [(112, 48)])
def test_an_image_that_is_not_square_equals_plain_diffusers(models: Models, width: int, height: int) -> None:
    request = tiny_request(width=width, height=height, **TRUE_CFG)

    assert draw(models.engine("dev"), request)[0].size == (width, height)
    models.assert_equal("dev", request)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    long_but(
        [(name, one) for name in ("dev", "schnell") for one in FLOW_CHOICES],
        # The batch below has them all with dev.
        ("dev", "unipc"),
        ("schnell", "dpm++"),
    ),
)
def test_every_scheduler_gives_the_image_plain_diffusers_gives_with_it(
    models: Models, name: str, scheduler: str
) -> None:
    models.assert_equal(name, tiny_request(scheduler=scheduler, num_inference_steps=3))


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "a blue house"}, {"guidance_scale": 9.0}, {"true_cfg_scale": 6.0}, {"negative_prompt": "light"}],
    ids=str,
)
def test_each_input_of_the_tiny_model_changes_its_image(models: Models, changes: dict[str, Any]) -> None:
    """Else none of these tests would see a wrong one."""
    assert models.psnr_after("dev", tiny_request(**TRUE_CFG), **changes) < MIN_PSNR_DB


def test_schnell_reads_no_guidance(models: Models) -> None:
    assert models.psnr_after("schnell", tiny_request(), guidance_scale=0.0) == math.inf


@pytest.mark.parametrize("fields", [{"true_cfg_scale": 3.0}, {"negative_prompt": "dark"}], ids=str)
def test_true_guidance_takes_a_scale_and_a_negative_prompt_as_in_the_pipeline(
    models: Models, fields: dict[str, Any]
) -> None:
    assert models.psnr_after("dev", tiny_request(), **fields) == math.inf
    models.assert_equal("dev", tiny_request(**fields))


# --- Prompts


@pytest.mark.parametrize(("name", "field", "most"), [("dev", "negative_prompt", 512), ("schnell", "prompt", 256)])
def test_prompts_are_read_to_the_last_token_and_one_more_is_refused(
    models: Models, name: str, field: str, most: int
) -> None:
    # Behind the space that T5's tokenizer puts first, and before the token that ends a prompt.
    longest = "".join("fox-and-hill"[i % 12] for i in range(most - 2))
    request = tiny_request(**TRUE_CFG | {field: longest})
    steps: list[Any] = []

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine(name), replace(request, **{field: f"{longest}!"}), steps)

    assert failure.value.code == "INVALID_PROMPT"
    assert f"{most + 1} tokens; this model reads {most}" in str(failure.value)
    assert steps == []
    models.assert_equal(name, request)
    assert models.psnr_after(name, request, **{field: f"{longest[:-1]}?"}) < math.inf


# --- Many at once


def mixed_requests(models: Models, folder: Path) -> list[GenerationRequest]:
    """Build requests that differ in all that lanes may differ in, with adapters of four writers and ranks."""
    pipe = load_pipe(models.checkpoint("dev"))
    few = write_adapter(folder / "few.safetensors", pipe, layout="diffusers_new", rank=4, seed=1)
    every = write_adapter(
        folder / "every.safetensors",
        pipe,
        layout="diffusers_new",
        rank=5,
        alpha=3,
        seed=2,
        targets=FLUX_EVERY_LAYER,
        text_encoder=True,
    )
    layers, of_xlabs = published_layers(pipe.transformer), xlabs_layers(pipe.transformer)
    fused = random_pairs(pipe.transformer, layers, rank=9, seed=3)
    # diffusers splits a single block's first layer at the widths of the published model alone.
    read = {name: pair for name, pair in fused.items() if "blocks" in name and not name.endswith("linear1")}
    kohya = write_pairs(
        folder / "kohya.safetensors", read, lambda name: f"lora_unet_{name.replace('.', '_')}", LORA_DOWN, alpha=6.0
    )
    xlabs = write_pairs(
        folder / "xlabs.safetensors",
        random_pairs(pipe.transformer, of_xlabs, rank=16, seed=4),
        str,
        ("down", "up"),
    )
    return [
        tiny_request(seeds=(1,), adapters=(AdapterFile(few, None, 1.0),)),
        tiny_request(
            seeds=(2,), num_inference_steps=5, scheduler="unipc", adapters=(AdapterFile(every, None, 0.8),), **TRUE_CFG
        ),
        tiny_request(
            seeds=(3,),
            num_inference_steps=4,
            guidance_scale=7.0,
            prompt=LONG,
            adapters=(AdapterFile(kohya, None, -0.7), AdapterFile(few, None, 0.5)),
        ),
        tiny_request(seeds=(4,), num_inference_steps=3, scheduler="lcm", negative_prompt="not read"),
        tiny_request(
            seeds=(5,),
            num_inference_steps=3,
            scheduler="heun",
            true_cfg_scale=5.0,
            negative_prompt=LONG,
            adapters=(AdapterFile(xlabs, None, 1.0),),
        ),
        tiny_request(seeds=(6,), num_inference_steps=4, scheduler="dpm++", guidance_scale=1.0),
    ]


def test_requests_that_share_nothing_give_together_what_each_gives_alone(models: Models, tmp_path: Path) -> None:
    engine = models.engine("dev")
    engine.model.batches.clear()

    calls = submit_together(engine, mixed_requests(models, tmp_path))

    assert_right(models.checkpoint("dev"), calls)
    assert max(map(len, engine.model.batches)) >= 6
    assert any(len({lane.num_rows for lane in lanes}) == 2 for lanes in engine.model.batches)
    for call in calls:
        if call.request.adapters:
            unadapted = draw(engine, replace(call.request, adapters=()))[0]
            assert psnr(call.image, unadapted) < DIFFERENT_DB


@pytest.mark.parametrize("layout", ["diffusers_new", pytest.param("peft_folder", marks=long)])
def test_an_adapter_of_every_layer_equals_plain_diffusers(models: Models, tmp_path: Path, layout: Layout) -> None:
    pipe = load_pipe(models.checkpoint("schnell"))
    targets = tuple(name for name in FLUX_EVERY_LAYER if "guidance" not in name)
    path = write_adapter(tmp_path / "a.safetensors", pipe, layout=layout, rank=6, alpha=4, targets=targets, seed=5)
    file = AdapterFile(path, None, 1.0)
    if layout == "peft_folder":
        file = AdapterFile(path / "adapter_model.safetensors", path / "adapter_config.json", 1.0)
    request = tiny_request(adapters=(file,), **TRUE_CFG)

    models.assert_equal("schnell", request)
    assert models.psnr_after("schnell", request, adapters=()) < DIFFERENT_DB


def test_images_of_two_sizes_take_turns(models: Models) -> None:
    engine = models.engine("dev")
    engine.model.batches.clear()

    calls = submit_together(engine, [tiny_request(), tiny_request(width=48, height=80), tiny_request(seeds=(2,))])

    assert_right(models.checkpoint("dev"), calls)
    assert all(len({lane.shape for lane in lanes}) == 1 for lanes in engine.model.batches)


def assert_right(checkpoint: Path, calls: list[EngineCall]) -> None:
    """Assert that every image is the one that plain diffusers draws for its request alone."""
    ratios = {call.request.seeds: psnr(call.image, alone(checkpoint, call.request)) for call in calls}
    assert {seeds: ratio for seeds, ratio in ratios.items() if ratio < SAME_DB} == {}


# --- What it refuses, and is refused


@pytest.mark.parametrize(("name", "fields"), [("dev", {"cfg_truncation": 0.5}), ("sd", {"true_cfg_scale": 2.0})])
def test_guidance_of_another_family_is_refused(models: Models, name: str, fields: dict[str, float]) -> None:
    with pytest.raises(RequestFailed, match=next(iter(fields))) as failure:
        draw(models.engine(name), tiny_request(**fields))

    assert failure.value.code == "INVALID_INPUT"


def test_a_transformer_for_control_is_refused_at_the_start(models: Models, tmp_path: Path) -> None:
    pipe = load_pipe(models.checkpoint("dev"))
    pipe.transformer = FluxTransformer2DModel.from_config(pipe.transformer.config, in_channels=128, out_channels=64)
    pipe.save_pretrained(tmp_path / "control")

    with pytest.raises(EngineStartFailed, match="128 input channels"):
        WatchedEngine(tmp_path / "control")


def test_controlnets_are_refused_at_the_start(models: Models, tmp_path: Path) -> None:
    net = write_controlnet(tmp_path / "net", load_pipe(models.checkpoint("sd")))

    with pytest.raises(EngineStartFailed, match="FluxControlNetModel"):
        WatchedEngine(models.checkpoint("dev"), CONTROLNETS=f"pose={net}")


# --- Attention


def test_the_attention_is_diffusers_own(models: Models) -> None:
    plain = load_pipe(models.checkpoint("dev")).transformer
    for kind in (plain.transformer_blocks, plain.single_transformer_blocks):
        attn = kind[0].attn
        image, text = torch.randn(2, 12, 64), torch.randn(2, 5, 64)
        inputs = (image, text) if attn.added_kv_proj_dim else (image,)
        places = torch.arange(17 if attn.added_kv_proj_dim else 12)[:, None].expand(-1, 3)
        cosine, sine = plain.pos_embed(places)

        with torch.inference_mode():
            theirs = attn(*inputs, image_rotary_emb=(cosine, sine))
            attn.set_processor(GroupedFluxAttnProcessor())
            ours = attn(*inputs, image_rotary_emb=torch.complex(cosine[:, ::2], sine[:, ::2])[None])

        torch.testing.assert_close(ours, theirs)
