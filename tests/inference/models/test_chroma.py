"""Chroma against plain diffusers, fp32 on a CPU: alone and in mixed batches, its adapters, and what it refuses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.errors import RequestFailed
from inference.request import AdapterFile, GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.flux_adapters import by_diffusers_names, published_layers, random_pairs, write_pairs
from tests.support.models.plain_families import FLOW_CHOICES, alone
from tests.support.models.tiny_chroma import build_tiny_chroma
from tests.support.models.tiny_models import load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

# What differs by no more is the same but for rounding.
SAME_DB = 60.0
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 3
LORA_DOWN, LORA_A = ("lora_down", "lora_up"), ("lora_A", "lora_B")
# Chroma's own, by its published names and by diffusers'.
DISTILLED = {
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.layers.1.in_layer": ("distilled_guidance_layer.layers.1.linear_1",),
    "distilled_guidance_layer.layers.0.out_layer": ("distilled_guidance_layer.layers.0.linear_2",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
}


class Models(FamilyModels):
    """The checkpoint of this file."""

    builders = MappingProxyType({"chroma": build_tiny_chroma})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def tiny_request(**fields: Any) -> GenerationRequest:
    usual = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "negative_prompt": "dull"}
    return request_of(**usual | fields)


def assert_equal(models: Models, request: GenerationRequest) -> None:
    """Assert that alone in the engine the request gives the image that plain diffusers draws."""
    drawn = draw(models.engine("chroma"), request)[0]
    assert psnr(drawn, alone(models.checkpoint("chroma"), request)) >= SAME_DB


def file_of(path: Path, scale: float = 1.0) -> AdapterFile:
    return AdapterFile(path, None, scale)


def test_steps_and_guidance_default_to_those_of_the_pipeline(models: Models) -> None:
    facts = models.engine("chroma").facts

    assert (facts.family, facts.default_steps, facts.default_guidance) == ("chroma", 35, 5.0)
    assert (facts.base_size, facts.size_multiple) == (64, 16)


@pytest.mark.parametrize(
    "fields",
    long_but(
        [{}, {"guidance_scale": 1.0}, {"negative_prompt": ""}, {"prompt": LONG, "width": 112, "height": 48}],
        {},
        {"negative_prompt": ""},
    ),
    ids=str,
)
def test_an_image_equals_plain_diffusers(models: Models, fields: dict[str, Any]) -> None:
    assert_equal(models, tiny_request(**fields))


@long
@pytest.mark.parametrize("scheduler", FLOW_CHOICES)
def test_every_scheduler_gives_the_image_plain_diffusers_gives_with_it(models: Models, scheduler: str) -> None:
    assert_equal(models, tiny_request(scheduler=scheduler, num_inference_steps=3))


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "a blue house"}, {"guidance_scale": 9.0}, {"guidance_scale": 0.0}, {"negative_prompt": "light"}],
    ids=str,
)
def test_each_input_of_the_tiny_model_changes_its_image(models: Models, changes: dict[str, Any]) -> None:
    """Else none of these tests would see a wrong one."""
    request = tiny_request()
    drawn = [draw(models.engine("chroma"), one)[0] for one in (request, replace(request, **changes))]

    assert psnr(*drawn) < MIN_PSNR_DB


def test_requests_that_share_nothing_give_together_what_each_gives_alone(models: Models, tmp_path: Path) -> None:
    engine, checkpoint = models.engine("chroma"), models.checkpoint("chroma")
    pipe = load_pipe(checkpoint)
    few = file_of(write_adapter(tmp_path / "few.safetensors", pipe, layout="diffusers_new", rank=4, seed=1))
    many = file_of(
        write_adapter(tmp_path / "many.safetensors", pipe, layout="diffusers_new", rank=9, alpha=4, seed=2), -0.8
    )
    requests = [
        tiny_request(seeds=(1,), adapters=(few,)),
        tiny_request(seeds=(2,), num_inference_steps=5, scheduler="unipc", adapters=(many,), prompt=LONG),
        tiny_request(seeds=(3,), num_inference_steps=4, guidance_scale=1.0, adapters=(many, few)),
        tiny_request(seeds=(4,), num_inference_steps=3, scheduler="lcm", negative_prompt=""),
        tiny_request(seeds=(5,), num_inference_steps=3, scheduler="heun", negative_prompt=LONG, guidance_scale=7.0),
        tiny_request(seeds=(6,), num_inference_steps=4, scheduler="dpm++", guidance_scale=0.0),
    ]
    engine.model.batches.clear()

    calls = submit_together(engine, requests)

    ratios = {call.request.seeds: psnr(call.image, alone(checkpoint, call.request)) for call in calls}
    assert {seeds: ratio for seeds, ratio in ratios.items() if ratio < SAME_DB} == {}
    assert max(map(len, engine.model.batches)) >= 6
    assert any(len({lane.num_rows for lane in lanes}) == 2 for lanes in engine.model.batches)
    assert psnr(calls[0].image, draw(engine, replace(requests[0], adapters=()))[0]) < DIFFERENT_DB


STEMS: dict[str, Callable[[str], str]] = {
    "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}",
    "ComfyUI": lambda name: f"diffusion_model.{name}",
    "published": str,
}


@pytest.mark.parametrize("writer", long_but(STEMS, "kohya"))
def test_an_adapter_by_the_names_of_its_writer_is_the_same_by_diffusers_names(
    models: Models, tmp_path: Path, writer: str
) -> None:
    transformer = load_pipe(models.checkpoint("chroma")).transformer
    known = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name: parts for name, parts in published_layers(transformer).items() if known.issuperset(parts)}
    layers |= DISTILLED
    pairs = random_pairs(transformer, layers, rank=6, seed=3)
    split = by_diffusers_names(transformer, layers, pairs)
    halves, alpha = (LORA_DOWN, 6.0) if writer == "kohya" else (LORA_A, None)
    written = write_pairs(tmp_path / "a.safetensors", pairs, STEMS[writer], halves, alpha)
    plain = write_pairs(tmp_path / "b.safetensors", split, lambda name: f"transformer.{name}", LORA_A)

    by_writer, by_diffusers, without = (
        draw(models.engine("chroma"), tiny_request(adapters=adapters))[0]
        for adapters in ((file_of(written),), (file_of(plain),), ())
    )

    assert psnr(by_writer, by_diffusers) >= SAME_DB
    assert psnr(by_writer, without) < DIFFERENT_DB
    assert_equal(models, tiny_request(adapters=(file_of(plain),)))


@pytest.mark.parametrize(
    ("stem", "code"),
    [
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "LORA_UNSUPPORTED"),
        # FLUX.1's own.
        ("transformer.transformer_blocks.0.norm1.linear", "LORA_INCOMPATIBLE"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "LORA_INCOMPATIBLE"),
    ],
)
def test_an_adapter_of_what_chroma_lacks_is_refused(models: Models, tmp_path: Path, stem: str, code: str) -> None:
    halves = LORA_DOWN if stem.startswith("lora_") else LORA_A
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{stem}.{half}.weight": torch.ones(64, 64) for half in halves}, path)

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine("chroma"), tiny_request(adapters=(file_of(path),)))

    assert failure.value.code == code


@pytest.mark.parametrize("field", long_but(["prompt", "negative_prompt"], "prompt"))
def test_a_prompt_of_one_token_too_many_is_refused(models: Models, field: str) -> None:
    # Behind the space that T5's tokenizer puts first, and before the token that ends a prompt.
    longest = "".join("fox-and-hill"[i % 12] for i in range(510))

    with pytest.raises(RequestFailed, match="513 tokens; this model reads 512") as failure:
        draw(models.engine("chroma"), tiny_request(**{field: f"{longest}!"}))

    assert failure.value.code == "INVALID_PROMPT"


@long
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_of_all_tokens_equals_plain_diffusers(models: Models, field: str) -> None:
    assert_equal(models, tiny_request(**{field: "".join("fox-and-hill"[i % 12] for i in range(510))}))


@pytest.mark.parametrize("fields", [{"true_cfg_scale": 2.0}, {"cfg_truncation": 0.5}, {"guidance_rescale": 0.5}])
def test_guidance_of_another_family_is_refused(models: Models, fields: dict[str, float]) -> None:
    with pytest.raises(RequestFailed, match=next(iter(fields))) as failure:
        draw(models.engine("chroma"), tiny_request(**fields))

    assert failure.value.code == "INVALID_INPUT"


@long
def test_previews_are_made_of_its_latents(tmp_path: Path) -> None:
    class WithPreviews(Models):
        def settings_for(self, name: str) -> dict[str, str]:
            return {"PREVIEW_EVERY": "1"}

    made = WithPreviews(tmp_path)
    steps: list[Any] = []
    draw(made.engine("chroma"), tiny_request(num_inference_steps=3), steps)
    made.close()

    shown = [step.preview for step in steps if step.preview is not None]
    assert [(one.width, one.height) for one in shown] == [(8, 8)] * 2
