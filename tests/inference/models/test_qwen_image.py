"""Qwen-Image against plain diffusers, fp32 on a CPU: alone and in mixed batches, its adapters, what it refuses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.errors import EngineStartFailed, RequestFailed
from inference.request import AdapterFile, GenerationRequest, Source
from tests.inference.engine.test_kinds import gradients, window
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, WatchedModel, submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.flux_adapters import random_pairs, write_pairs
from tests.support.models.plain_families import FLOW_CHOICES, alone
from tests.support.models.tiny_models import load_pipe, write_adapter
from tests.support.models.tiny_qwen_image import build_tiny_qwen_image

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

# What differs by no more is the same but for rounding.
SAME_DB = 60.0
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 3
LORA_DOWN, LORA_A = ("lora_down", "lora_up"), ("lora_A", "lora_B")
# By which the tiny model's text is cut: the template's beginning, as many tokens as of the published tokenizer.
BEHIND_TEMPLATE = 512


class SmallQwenImage(WatchedModel):
    """The warm-up's image is of the tiny size."""

    base_size = 64


class Models(FamilyModels):
    """The checkpoint of this file."""

    builders = MappingProxyType({"qwen": build_tiny_qwen_image})

    def engine(self, name: str) -> WatchedEngine:
        if name not in self._engines:
            self._engines[name] = WatchedEngine(self.checkpoint(name), SmallQwenImage, **self.settings_for(name))
        return self._engines[name]


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
    drawn = draw(models.engine("qwen"), request)[0]
    assert psnr(drawn, alone(models.checkpoint("qwen"), request)) >= SAME_DB


def file_of(path: Path, scale: float = 1.0) -> AdapterFile:
    return AdapterFile(path, None, scale)


def test_steps_and_guidance_default_to_those_of_the_pipeline(models: Models) -> None:
    facts = models.engine("qwen").facts

    assert (facts.family, facts.default_steps, facts.default_guidance) == ("qwen-image", 50, 4.0)
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


@pytest.mark.parametrize("scheduler", long_but(FLOW_CHOICES, "unipc"))
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
    drawn = [draw(models.engine("qwen"), one)[0] for one in (request, replace(request, **changes))]

    assert psnr(*drawn) < MIN_PSNR_DB


def test_requests_that_share_nothing_give_together_what_each_gives_alone(models: Models, tmp_path: Path) -> None:
    engine, checkpoint = models.engine("qwen"), models.checkpoint("qwen")
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
    "ai-toolkit": lambda name: f"transformer.{name}",
    "lightx2v": str,
}


@pytest.mark.parametrize("writer", long_but(STEMS, "kohya"))
def test_an_adapter_by_the_names_of_its_writer_equals_plain_diffusers(
    models: Models, tmp_path: Path, writer: str
) -> None:
    transformer = load_pipe(models.checkpoint("qwen")).transformer
    layers = {name: (name,) for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    pairs = random_pairs(transformer, layers, rank=6, seed=3)
    halves, alpha = (LORA_DOWN, 3.0) if writer in {"kohya", "lightx2v"} else (LORA_A, None)
    path = write_pairs(tmp_path / "a.safetensors", pairs, STEMS[writer], halves, alpha)
    request = tiny_request(adapters=(file_of(path),))

    assert_equal(models, request)
    assert psnr(*(draw(models.engine("qwen"), one)[0] for one in (request, tiny_request()))) < DIFFERENT_DB


@pytest.mark.parametrize(
    ("stem", "code"),
    [
        ("text_encoder.model.layers.0.self_attn.q_proj", "LORA_UNSUPPORTED"),
        # FLUX.1's own.
        ("transformer.single_transformer_blocks.0.attn.to_q", "LORA_INCOMPATIBLE"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "LORA_INCOMPATIBLE"),
    ],
)
def test_an_adapter_of_what_qwen_image_lacks_is_refused(models: Models, tmp_path: Path, stem: str, code: str) -> None:
    halves = LORA_DOWN if stem.startswith("lora_") else LORA_A
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{stem}.{half}.weight": torch.ones(64, 64) for half in halves}, path)

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine("qwen"), tiny_request(adapters=(file_of(path),)))

    assert failure.value.code == code


@pytest.mark.parametrize("field", long_but(["prompt", "negative_prompt"], "prompt"))
def test_prompts_are_read_to_the_last_token_and_one_more_is_refused(models: Models, field: str) -> None:
    pipe = load_pipe(models.checkpoint("qwen"))
    around = (
        len(pipe.tokenizer(pipe.prompt_template_encode.format("")).input_ids) - pipe.prompt_template_encode_start_idx
    )
    # A token of the tiny tokenizer is a byte.
    longest = "".join("fox-and-hill"[i % 12] for i in range(BEHIND_TEMPLATE - around))

    with pytest.raises(RequestFailed, match="513 tokens with what follows it; this model reads 512") as failure:
        draw(models.engine("qwen"), tiny_request(**{field: f"{longest}!"}))

    assert failure.value.code == "INVALID_PROMPT"
    assert_equal(models, tiny_request(**{field: longest}))


@pytest.mark.parametrize("kind", long_but(["image2image", "inpaint"], "inpaint"))
@pytest.mark.parametrize("scheduler", long_but(FLOW_CHOICES, "euler"))
def test_an_image_from_another_equals_plain_diffusers(models: Models, kind: str, scheduler: str) -> None:
    mask = window() if kind == "inpaint" else None

    assert_equal(
        models, tiny_request(num_inference_steps=4, scheduler=scheduler, source=Source(gradients(), 0.7, mask))
    )


def test_the_scale_of_its_pipeline_takes_the_place_of_guidance_where_a_job_names_it(models: Models) -> None:
    by_guidance = draw(models.engine("qwen"), tiny_request(guidance_scale=3.0))[0]
    by_true_cfg = draw(models.engine("qwen"), tiny_request(guidance_scale=1.0, true_cfg_scale=3.0))[0]

    assert psnr(by_guidance, by_true_cfg) >= SAME_DB


def test_a_scale_of_one_takes_one_pass_whatever_the_guidance_is(models: Models) -> None:
    """As LoRAs of few steps are drawn, whose jobs leave the worker's guidance as it is."""
    engine, request = models.engine("qwen"), tiny_request(guidance_scale=4.0, true_cfg_scale=1.0)
    engine.model.batches.clear()

    assert_equal(models, request)
    assert {lane.num_rows for lanes in engine.model.batches for lane in lanes} == {1}


def test_a_vae_of_the_operator_s_own_is_refused_at_the_start(models: Models) -> None:
    with pytest.raises(EngineStartFailed, match="takes no VAE for a QwenImagePipeline: unset it"):
        WatchedEngine(models.checkpoint("qwen"), VAE_ID="owner/vae")


@pytest.mark.parametrize("fields", [{"cfg_truncation": 0.5}, {"guidance_rescale": 0.5}])
def test_guidance_of_another_family_is_refused(models: Models, fields: dict[str, float]) -> None:
    with pytest.raises(RequestFailed, match=next(iter(fields))) as failure:
        draw(models.engine("qwen"), tiny_request(**fields))

    assert failure.value.code == "INVALID_INPUT"


@long
def test_previews_are_made_of_its_latents(tmp_path: Path) -> None:
    class WithPreviews(Models):
        def settings_for(self, name: str) -> dict[str, str]:
            return {"PREVIEW_EVERY": "1"}

    made = WithPreviews(tmp_path)
    steps: list[Any] = []
    draw(made.engine("qwen"), tiny_request(num_inference_steps=3), steps)
    made.close()

    shown = [step.preview for step in steps if step.preview is not None]
    assert [(one.width, one.height) for one in shown] == [(8, 8)] * 2
