"""FLUX.2 klein against plain diffusers, fp32 on a CPU: from text and from references, alone and in mixed batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.errors import EngineStartFailed, RequestFailed
from inference.models.attention.flux_2 import Flux2SingleAttnProcessor, GroupedFlux2AttnProcessor
from inference.models.prechecks import precheck_model
from inference.request import AdapterFile, GenerationRequest, Reference, Source, StepReport
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import EngineCall, WatchedEngine, submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr, settings_of
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.flux_2_adapters import FLUX_2_EVERY_LAYER, published_layers
from tests.support.models.flux_adapters import random_pairs, write_pairs
from tests.support.models.plain_families import FLOW_CHOICES, alone
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_models import load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "base": build_tiny_flux_2,
    "distilled": lambda folder: build_tiny_flux_2(folder, seed=1, is_distilled=True),
}
# What differs by no more is the same but for rounding.
SAME_DB = 60.0


def reference(width: int, height: int, seed: int = 0) -> Reference:
    """Build a reference of coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Reference(width, height, squares.repeat(8, 0).repeat(8, 1)[:height, :width].tobytes())


ONE = {"references": (reference(64, 64),)}
# The second is cut to whole tokens.
TWO = {"references": (reference(64, 96), reference(89, 70, seed=1))}


class Models(FamilyModels):
    """The checkpoints of this file."""

    builders = CHECKPOINTS

    def assert_equal(self, name: str, request: GenerationRequest) -> None:
        """Assert that alone in the engine the request gives the image that plain diffusers draws."""
        drawn = draw(self.engine(name), request)[0]
        assert psnr(drawn, alone(self.checkpoint(name), request)) >= SAME_DB

    def settings_for(self, name: str) -> dict[str, str]:
        return {"PREVIEW_EVERY": "1"} if name == "distilled" else {}

    def psnr_after(self, name: str, request: GenerationRequest, **changes: Any) -> float:
        """Return how close the engine's image with other values is."""
        return psnr(*(draw(self.engine(name), one)[0] for one in (request, replace(request, **changes))))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def tiny_request(**fields: Any) -> GenerationRequest:
    """Build a short request in the tiny checkpoints' native size, with the guidance of the base model."""
    usual = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "negative_prompt": ""}
    return request_of(**usual | fields)


def test_steps_and_guidance_default_to_those_of_the_checkpoint(models: Models) -> None:
    facts = [models.engine(name).facts for name in ("base", "distilled")]

    assert [(one.default_steps, one.default_guidance) for one in facts] == [(50, 4.0), (4, 1.0)]
    assert precheck_model(settings_of(models.checkpoint("base"))).kinds == ("text2image", "edit")
    assert {(one.family, one.base_size, one.size_multiple, one.kinds) for one in facts} == {
        ("flux2-klein", 64, 16, ("text2image", "edit"))
    }


# --- Alone


@pytest.mark.parametrize(
    ("name", "fields"),
    long_but(
        [
            (name, fields)
            for name in ("base", "distilled")
            for fields in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "dark"}, ONE, TWO)
        ],
        ("base", {"negative_prompt": "dark"}),
        ("base", TWO),
        ("distilled", ONE),
    ),
    ids=[
        "-".join(one) for one in [(n, k) for n in ("base", "distilled") for k in ("plain", "1", "dark", "one", "two")]
    ],
)
def test_an_image_equals_plain_diffusers(models: Models, name: str, fields: dict[str, Any]) -> None:
    models.assert_equal(name, tiny_request(**fields))


def test_an_edit_that_is_not_square_equals_plain_diffusers(models: Models) -> None:
    request = tiny_request(width=112, height=48, **ONE)

    assert draw(models.engine("base"), request)[0].size == (112, 48)
    models.assert_equal("base", request)


@pytest.mark.parametrize("scheduler", long_but(FLOW_CHOICES, "unipc"))
def test_every_scheduler_gives_the_image_plain_diffusers_gives_with_it(models: Models, scheduler: str) -> None:
    models.assert_equal("distilled", tiny_request(scheduler=scheduler, num_inference_steps=3, **ONE))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a blue house"},
        {"guidance_scale": 9.0},
        {"negative_prompt": "light"},
        {"references": ()},
        {"references": (reference(64, 64, seed=2),)},
        {"references": (*TWO["references"], *ONE["references"])},
    ],
    ids=["prompt", "guidance", "negative prompt", "no reference", "another reference", "more references"],
)
def test_each_input_of_the_tiny_model_changes_its_image(models: Models, changes: dict[str, Any]) -> None:
    """Else none of these tests would see a wrong one."""
    assert models.psnr_after("base", tiny_request(**ONE), **changes) < MIN_PSNR_DB


@long
def test_the_order_of_references_matters(models: Models) -> None:
    backwards = TWO["references"][::-1]

    assert models.psnr_after("base", tiny_request(**TWO), references=backwards) < SAME_DB
    models.assert_equal("base", tiny_request(references=backwards))


def test_a_distilled_checkpoint_reads_neither_guidance_nor_negative_prompt(models: Models) -> None:
    request = tiny_request(guidance_scale=1.0)

    assert models.psnr_after("distilled", request, guidance_scale=5.0, negative_prompt="dark") == math.inf


# --- Prompts


def test_prompts_are_read_to_the_last_token_and_one_more_is_refused(models: Models) -> None:
    tokenizer = load_pipe(models.checkpoint("base")).tokenizer
    chat = [{"role": "user", "content": ""}]
    around = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    room = 512 - len(tokenizer(around).input_ids)
    longest = "".join("fox and hill"[i % 12] for i in range(room))
    request = tiny_request(prompt=longest, guidance_scale=1.0)

    with pytest.raises(RequestFailed, match="513 tokens with the model's own around it; it reads 512") as failure:
        draw(models.engine("base"), replace(request, prompt=f"{longest}!"))

    assert failure.value.code == "INVALID_PROMPT"
    models.assert_equal("base", request)


# --- Many at once


def mixed_requests(models: Models, folder: Path) -> list[GenerationRequest]:
    """Build requests that differ in all that lanes of one shape may differ in, with adapters of three writers."""
    pipe = load_pipe(models.checkpoint("base"))
    every = write_adapter(
        folder / "every.safetensors", pipe, layout="diffusers_new", rank=5, alpha=3, seed=2, targets=FLUX_2_EVERY_LAYER
    )
    layers = published_layers(pipe.transformer)
    pairs = random_pairs(pipe.transformer, layers, rank=9, seed=3)
    in_blocks = {name: pair for name, pair in pairs.items() if "blocks" in name}
    kohya = write_pairs(
        folder / "kohya.safetensors",
        in_blocks,
        lambda name: f"lora_unet_{name.replace('.', '_')}",
        ("lora_down", "lora_up"),
        alpha=6.0,
    )
    toolkit = write_pairs(
        folder / "toolkit.safetensors", in_blocks, lambda name: f"diffusion_model.{name}", ("lora_A", "lora_B")
    )
    return [
        tiny_request(seeds=(1,), adapters=(AdapterFile(every, None, 0.8),)),
        tiny_request(
            seeds=(2,), num_inference_steps=4, scheduler="unipc", negative_prompt="dark", prompt="a long road " * 9
        ),
        tiny_request(
            seeds=(3,),
            num_inference_steps=3,
            guidance_scale=1.0,
            adapters=(AdapterFile(kohya, None, -0.7), AdapterFile(every, None, 0.5)),
        ),
        tiny_request(seeds=(4,), num_inference_steps=3, scheduler="lcm", guidance_scale=0.0),
        tiny_request(seeds=(5,), scheduler="heun", guidance_scale=7.0, adapters=(AdapterFile(toolkit, None, 1.0),)),
    ]


def test_requests_that_share_nothing_give_together_what_each_gives_alone(models: Models, tmp_path: Path) -> None:
    engine = models.engine("base")
    engine.model.batches.clear()

    calls = submit_together(engine, mixed_requests(models, tmp_path))

    assert_right(models.checkpoint("base"), calls)
    assert max(map(len, engine.model.batches)) >= 5
    assert any(len({lane.num_rows for lane in lanes}) == 2 for lanes in engine.model.batches)
    for call in calls:
        if call.request.adapters:
            unadapted = draw(engine, replace(call.request, adapters=()))[0]
            assert psnr(call.image, unadapted) < DIFFERENT_DB


def test_edits_share_a_forward_where_images_and_references_have_the_same_sizes(models: Models) -> None:
    engine = models.engine("base")
    engine.model.batches.clear()

    calls = submit_together(
        engine,
        [
            tiny_request(seeds=(1,), **ONE),
            tiny_request(seeds=(2,), references=(reference(64, 64, seed=5),), guidance_scale=1.0),
            tiny_request(seeds=(3,), **TWO),
            tiny_request(seeds=(4,), references=TWO["references"][:1], guidance_scale=1.0),
        ],
    )

    assert_right(models.checkpoint("base"), calls)
    assert (1, 2) in {tuple(lane.seed for lane in lanes) for lanes in engine.model.batches}
    assert all(len({lane.shape for lane in lanes}) == 1 for lanes in engine.model.batches)


def assert_right(checkpoint: Path, calls: list[EngineCall]) -> None:
    """Assert that every image is the one that plain diffusers draws for its request alone."""
    ratios = {call.request.seeds: psnr(call.image, alone(checkpoint, call.request)) for call in calls}
    assert {seeds: ratio for seeds, ratio in ratios.items() if ratio < SAME_DB} == {}


# --- Previews


def test_the_first_preview_is_the_image_after_one_step_of_one(models: Models) -> None:
    checkpoint = models.checkpoint("distilled")
    request, steps = tiny_request(height=96), list[StepReport]()
    draw(models.engine("distilled"), request, steps)
    projection = models.engine("distilled").model.find_projection()
    pipe = load_pipe(checkpoint)
    sampler_noise = torch.Generator().manual_seed(request.seeds[0])

    # The same noise levels: the shift depends on the number of steps.
    pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=1.0)
    latents = pipe(
        prompt=request.prompt, width=64, height=96, num_inference_steps=1, generator=sampler_noise, output_type="latent"
    ).images

    (preview,) = (step.preview for step in steps if step.preview is not None)
    shown = np.frombuffer(preview.rgb, np.uint8).reshape(preview.height, preview.width, 3)
    expected = projection(latents[0]).numpy()
    assert (preview.width, preview.height) == (8, 12)
    assert expected.std() > 1
    assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 1


# --- What it refuses


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"source": Source(bytes(64 * 64 * 3), 0.5)}, "UNSUPPORTED_BY_MODEL"),
        ({"true_cfg_scale": 2.0}, "INVALID_INPUT"),
    ],
    ids=["image2image", "true_cfg_scale"],
)
def test_what_the_family_has_not_is_refused(models: Models, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestFailed) as failure:
        draw(models.engine("distilled"), tiny_request(**fields))

    assert failure.value.code == code


def test_another_vae_is_refused_at_the_start(models: Models) -> None:
    checkpoint = models.checkpoint("distilled")

    with pytest.raises(EngineStartFailed, match="takes no VAE for a Flux2KleinPipeline"):
        WatchedEngine(checkpoint, VAE_ID=str(checkpoint / "vae"))


# --- Attention


def test_the_attention_is_diffusers_own(models: Models) -> None:
    plain = load_pipe(models.checkpoint("base")).transformer
    processors = (GroupedFlux2AttnProcessor(), Flux2SingleAttnProcessor())
    for blocks, ours in zip((plain.transformer_blocks, plain.single_transformer_blocks), processors, strict=True):
        attn = blocks[0].attn
        image, text = torch.randn(2, 12, 64), torch.randn(2, 5, 64)
        is_double = isinstance(ours, GroupedFlux2AttnProcessor)
        inputs = (image, text) if is_double else (image,)
        places = torch.arange(17 if is_double else 12)[:, None].expand(-1, 4)
        cosine, sine = plain.pos_embed(places)

        with torch.inference_mode():
            theirs = attn(*inputs, image_rotary_emb=(cosine, sine))
            attn.set_processor(ours)
            table = torch.complex(cosine[:, ::2], sine[:, ::2])
            found = attn(*inputs, image_rotary_emb=(table, table[:0]))

        torch.testing.assert_close(found, theirs)
