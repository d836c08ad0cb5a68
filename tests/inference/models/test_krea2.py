"""Krea 2 against plain diffusers, fp32 on a CPU: alone and in mixed batches, its adapters, and what it refuses."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.configuration_utils import FrozenDict

from inference.errors import EngineStartFailed, RequestFailed
from inference.models.prechecks import precheck_model
from inference.request import AdapterFile, GenerationRequest, Source
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import WatchedEngine, submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr, settings_of
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.flux_adapters import by_diffusers_names, random_pairs, write_pairs
from tests.support.models.plain_families import FLOW_CHOICES, alone
from tests.support.models.tiny_controls import write_controlnet
from tests.support.models.tiny_krea2 import build_tiny_krea2
from tests.support.models.tiny_models import build_tiny_z_image, load_pipe, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

# What differs by no more is the same but for rounding.
SAME_DB = 60.0
LONG = "a red fox sits on a green hill, under a wide sky, and looks at the sea. " * 3
LORA_DOWN, LORA_A = ("lora_down", "lora_up"), ("lora_A", "lora_B")
# By the published names those of diffusers, in a block and outside the blocks.
IN_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
BLOCKS = {
    "blocks.0": "transformer_blocks.0",
    "blocks.1": "transformer_blocks.1",
    "txtfusion.layerwise_blocks.0": "text_fusion.layerwise_blocks.0",
    "txtfusion.refiner_blocks.0": "text_fusion.refiner_blocks.0",
}
OUTSIDE = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}
PUBLISHED = {
    **{f"{block}.{layer}": (f"{BLOCKS[block]}.{IN_BLOCK[layer]}",) for block in BLOCKS for layer in IN_BLOCK},
    **{name: (layer,) for name, layer in OUTSIDE.items()},
}


def build_turbo(folder: Path) -> Path:
    return build_tiny_krea2(folder, is_turbo=True)


class Models(FamilyModels):
    """The checkpoints of this file."""

    builders = MappingProxyType({"raw": build_tiny_krea2, "turbo": build_turbo})

    def settings_for(self, name: str) -> dict[str, str]:
        return {"PREVIEW_EVERY": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def tiny_request(**fields: Any) -> GenerationRequest:
    usual = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "negative_prompt": "dull"}
    return request_of(**usual | fields)


def assert_equal(models: Models, request: GenerationRequest, name: str = "raw") -> None:
    """Assert that alone in the engine the request gives the image that plain diffusers draws."""
    drawn = draw(models.engine(name), request)[0]
    assert psnr(drawn, alone(models.checkpoint(name), request)) >= SAME_DB


def file_of(path: Path, scale: float = 1.0) -> AdapterFile:
    return AdapterFile(path, None, scale)


@pytest.mark.parametrize(("name", "steps", "guidance"), [("raw", 28, 4.5), ("turbo", 8, 0.0)])
def test_steps_and_guidance_default_to_those_of_the_checkpoint(
    models: Models, name: str, steps: int, guidance: float
) -> None:
    facts = models.engine(name).facts

    assert (facts.family, facts.default_steps, facts.default_guidance) == ("krea-2", steps, guidance)
    assert (facts.base_size, facts.size_multiple, facts.kinds) == (64, 16, ("text2image",))


def test_the_base_size_of_a_published_checkpoint_is_1024(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.engine("raw").model
    vae = model._pipeline.vae
    published = {name: value for name, value in vae.config.items() if name != "sample_size"}
    monkeypatch.setattr(vae, "_internal_dict", FrozenDict(published))

    assert model.base_size == 1024


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 0.0},
        {"guidance_scale": 0.5},
        {"negative_prompt": ""},
        {"prompt": "", "negative_prompt": LONG},
        {"prompt": LONG, "width": 112, "height": 48},
    ],
    ids=str,
)
def test_an_image_equals_plain_diffusers(models: Models, fields: dict[str, Any]) -> None:
    assert_equal(models, tiny_request(**fields))


@pytest.mark.parametrize("name", long_but(["raw", "turbo"], "turbo"))
@pytest.mark.parametrize("scheduler", long_but(FLOW_CHOICES, "unipc"))
def test_every_scheduler_gives_the_image_plain_diffusers_gives_with_it(
    models: Models, scheduler: str, name: str
) -> None:
    assert_equal(models, tiny_request(scheduler=scheduler, num_inference_steps=3), name)


def test_the_shift_of_turbo_is_fixed_and_of_raw_by_the_size(models: Models) -> None:
    small, large = (tiny_request(width=side, height=side) for side in (64, 128))

    shifts = {name: [models.engine(name).model._shift(one) for one in (small, large)] for name in ("raw", "turbo")}

    assert shifts["turbo"] == [1.15, 1.15]
    assert shifts["raw"] == pytest.approx([0.5 + (num - 256) * 0.65 / 6144 for num in (16, 64)])
    assert psnr(*(draw(models.engine(name), small)[0] for name in shifts)) < DIFFERENT_DB


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "a blue house"}, {"guidance_scale": 9.0}, {"guidance_scale": 0.0}, {"negative_prompt": "light"}],
    ids=str,
)
def test_each_input_of_the_tiny_model_changes_its_image(models: Models, changes: dict[str, Any]) -> None:
    """Else none of these tests would see a wrong one."""
    request = tiny_request()
    drawn = [draw(models.engine("raw"), one)[0] for one in (request, replace(request, **changes))]

    assert psnr(*drawn) < MIN_PSNR_DB


@pytest.mark.parametrize("name", long_but(["raw", "turbo"], "raw"))
def test_requests_that_share_nothing_give_together_what_each_gives_alone(
    models: Models, tmp_path: Path, name: str
) -> None:
    engine, checkpoint = models.engine(name), models.checkpoint(name)
    pipe = load_pipe(checkpoint)
    few = file_of(write_adapter(tmp_path / "few.safetensors", pipe, layout="diffusers_new", rank=4, seed=1))
    targets = tuple(sorted(layer.rpartition("blocks.0.")[2] for (layer,) in PUBLISHED.values()))
    many = file_of(
        write_adapter(
            tmp_path / "many.safetensors", pipe, layout="diffusers_new", rank=9, alpha=4, seed=2, targets=targets
        ),
        -0.8,
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
    transformer = load_pipe(models.checkpoint("raw")).transformer
    linear = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {layer for (layer,) in PUBLISHED.values()} == linear
    pairs = random_pairs(transformer, PUBLISHED, rank=6, seed=3)
    renamed = by_diffusers_names(transformer, PUBLISHED, pairs)
    halves, alpha = (LORA_DOWN, 6.0) if writer == "kohya" else (LORA_A, None)
    files = [
        file_of(write_pairs(tmp_path / "a.safetensors", pairs, STEMS[writer], halves, alpha)),
        file_of(write_pairs(tmp_path / "b.safetensors", renamed, lambda name: f"transformer.{name}", LORA_A)),
        file_of(write_pairs(tmp_path / "c.safetensors", renamed, STEMS[writer], halves, alpha)),
    ]

    drawn = [draw(models.engine("raw"), tiny_request(adapters=(file,)))[0] for file in files]

    assert min(psnr(drawn[0], one) for one in drawn[1:]) >= SAME_DB
    assert psnr(drawn[0], draw(models.engine("raw"), tiny_request())[0]) < DIFFERENT_DB
    assert_equal(models, tiny_request(adapters=(files[1],)))
    if writer == "ComfyUI":
        # diffusers knows these names too.
        assert_equal(models, tiny_request(adapters=(files[0],)))


@pytest.mark.parametrize(
    ("stem", "code"),
    [
        ("text_encoder.language_model.layers.0.self_attn.q_proj", "LORA_UNSUPPORTED"),
        # Z-Image's and FLUX.1's.
        ("diffusion_model.layers.0.attention.to_q", "LORA_INCOMPATIBLE"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "LORA_INCOMPATIBLE"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "LORA_INCOMPATIBLE"),
    ],
)
def test_an_adapter_of_what_krea_2_lacks_is_refused(models: Models, tmp_path: Path, stem: str, code: str) -> None:
    halves = LORA_DOWN if stem.startswith("lora_") else LORA_A
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"{stem}.{half}.weight": torch.ones(64, 64) for half in halves}, path)

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine("raw"), tiny_request(adapters=(file_of(path),)))

    assert failure.value.code == code


@pytest.mark.parametrize("field", long_but(["prompt", "negative_prompt"], "prompt"))
def test_prompts_are_read_to_the_last_token_and_one_more_is_refused(models: Models, field: str) -> None:
    pipe = load_pipe(models.checkpoint("raw"))
    # The tiny tokenizer has a token a letter, and more for the template than Qwen's.
    most = 507 + 34 - len(pipe.tokenizer(pipe.prompt_template_encode_prefix).input_ids)
    longest = "".join("fox-and-hill"[i % 12] for i in range(most))

    with pytest.raises(RequestFailed, match="508 tokens; this model reads 507") as failure:
        draw(models.engine("raw"), tiny_request(**{field: f"{longest}!"}))

    assert failure.value.code == "INVALID_PROMPT"
    assert_equal(models, tiny_request(**{field: longest}))


@pytest.mark.parametrize("fields", [{"true_cfg_scale": 2.0}, {"cfg_truncation": 0.5}, {"guidance_rescale": 0.5}])
def test_guidance_of_another_family_is_refused(models: Models, fields: dict[str, float]) -> None:
    with pytest.raises(RequestFailed, match=next(iter(fields))) as failure:
        draw(models.engine("raw"), tiny_request(**fields))

    assert failure.value.code == "INVALID_INPUT"


@pytest.mark.parametrize("mask", [None, bytes(64 * 64)], ids=["image2image", "inpaint"])
def test_a_source_is_refused_for_want_of_a_pipeline(models: Models, mask: bytes | None) -> None:
    source = Source(rgb=bytes(3 * 64 * 64), strength=0.5, mask=mask)

    with pytest.raises(RequestFailed, match="draws text2image and nothing else") as failure:
        draw(models.engine("raw"), tiny_request(source=source))

    assert failure.value.code == "UNSUPPORTED_BY_MODEL"
    assert precheck_model(settings_of(models.checkpoint("raw"))).kinds == ("text2image",)


def test_another_vae_is_refused_with_one_sentence(models: Models) -> None:
    checkpoint = models.checkpoint("raw")

    with pytest.raises(EngineStartFailed, match="this version takes no VAE for a Krea2Pipeline: unset it"):
        WatchedEngine(checkpoint, VAE_ID=str(checkpoint / "vae"))


def test_a_controlnet_of_another_family_is_refused(models: Models, tmp_path: Path) -> None:
    net = write_controlnet(tmp_path / "net", load_pipe(build_tiny_z_image(tmp_path / "z-image")))

    with pytest.raises(EngineStartFailed, match="holds a ZImageControlNetModel; this model takes none"):
        WatchedEngine(models.checkpoint("raw"), CONTROLNETS=f"pose={net}")


def test_the_first_preview_is_the_image_after_one_step_of_one(models: Models) -> None:
    engine = models.engine("turbo")
    steps: list[Any] = []
    draw(engine, tiny_request(height=96, guidance_scale=0.0), steps)
    projection = engine.default.family.find_projection()

    pipe = load_pipe(models.checkpoint("turbo"))
    generator = torch.Generator().manual_seed(42)
    fields = {"width": 64, "height": 96, "num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    packed = pipe("a red fox", generator=generator, **fields).images

    (preview,) = (step.preview for step in steps if step.preview is not None)
    expected = projection(pipe._unpack_latents(packed, 96, 64)[0, :, 0])
    shown = np.frombuffer(preview.rgb, np.uint8).reshape(preview.height, preview.width, 3)
    assert np.abs(shown.astype(int) - expected.numpy().astype(int)).max() <= 1


def test_latents_in_the_denoiser_s_scale_are_those_of_the_vae_again(models: Models) -> None:
    model = models.engine("raw").model
    latents = torch.randn(16, 8, 8)

    assert torch.allclose(model._scaled(model._unscaled(latents[None])[0]), latents, atol=1e-5)


@long
def test_tiles_are_put_together_to_the_whole_size(models: Models) -> None:
    model = models.engine("raw").model
    # [height, width, channels of a patch], of 320x288 pixels: a tile has 256.
    latents = torch.randn(20, 18, 64, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        whole, tiled = (model.decode(latents, in_tiles=in_tiles).wait() for in_tiles in (False, True))

    assert whole is not None
    assert tiled is not None
    assert whole.shape == tiled.shape == (320, 288, 3)
    assert (whole != tiled).any()
    # Far from a seam there is none.
    difference = np.abs(whole.astype(int) - tiled)[:128, :128]
    assert difference.mean() < 3
