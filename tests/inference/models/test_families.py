"""Every family's pictures against plain diffusers', fp32 on a CPU: alone, in mixed batches, and where requests end."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from inference.errors import RequestFailed
from inference.lane import ActiveRequest, Conditioning, Lane
from inference.models.base import Family
from inference.models.inputs import Prompt
from inference.request import AdapterFile, GenerationRequest
from inference.sampling.samplers import Sampler
from tests.support.copies import NOWHERE, Copies
from tests.support.cuda.on_gpu import on_gpu
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import EngineCall, submit_together
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, TEST_DEVICE, draw, pipe_with, psnr
from tests.support.long import long, long_but
from tests.support.models.family_models import FamilyModels
from tests.support.models.plain_families import DIFFUSION_CHOICES, FLOW_CHOICES, alone, embeddings_by_compel
from tests.support.models.tiny_adapters import Z_IMAGE_BLOCKS, Z_IMAGE_EVERY_LAYER
from tests.support.models.tiny_flux import build_tiny_flux
from tests.support.models.tiny_flux_2 import build_tiny_flux_2
from tests.support.models.tiny_models import (
    EVERY_LAYER,
    Layout,
    build_tiny_sd,
    build_tiny_sd2,
    build_tiny_sdxl,
    build_tiny_z_image,
    load_pipe,
    write_adapter,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_forward_failed")

# By name, how each checkpoint is made. "sd" is Stable Diffusion 2.x; the other tests of the engine are about 1.x.
CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sd": build_tiny_sd2,
    "sdxl": build_tiny_sdxl,
    "sdxl_without_zeros": lambda folder: build_tiny_sdxl(folder, seed=1, force_zeros=False),
    "z_image": build_tiny_z_image,
    "z_image_dynamic": lambda folder: build_tiny_z_image(folder, seed=1, dynamic=True),
    # Its images are in `test_flux.py`.
    "flux": build_tiny_flux,
    # In `test_flux_2.py`.
    "flux_2": build_tiny_flux_2,
}
SCHEDULERS = {
    "sd": DIFFUSION_CHOICES,
    "sdxl": DIFFUSION_CHOICES,
    "z_image": FLOW_CHOICES,
    "z_image_dynamic": FLOW_CHOICES,
}
LONGEST_CAPTION = 512
# 306 tokens in six chunks: the tiny models' tokenizers make one of every letter.
SENTENCE = "a red fox sits on a green hill, under a wide sky, and looks at the sea. "
LONG = SENTENCE * 5 + "a lamp burns far away in the dark over the sea"
OTHER_END = SENTENCE * 5 + "a barn burns far away in the dark over the sea"
# What differs by no more is the same but for rounding. The promise is less, but these models are so tiny that a slip,
# or a word among three hundred tokens, changes little: 42 dB would not show it.
# Another device rounds otherwise.
SAME_DB = 60.0 if TEST_DEVICE == "cpu" else MIN_PSNR_DB


class Models(FamilyModels):
    """The checkpoints of this file."""

    builders = CHECKPOINTS

    def adapter(self, name: str, path: Path, *, scale: float = 1.0, **kind: Any) -> AdapterFile:
        """Write a random adapter for a checkpoint."""
        return AdapterFile(write_adapter(path, load_pipe(self.checkpoint(name)), **kind), None, scale)

    def assert_equal(self, name: str, request: GenerationRequest) -> None:
        """Assert that alone in the engine the request gives the image that plain diffusers draws."""
        drawn = draw(self.engine(name), request)[0]
        assert psnr(drawn, alone(self.checkpoint(name), request)) >= SAME_DB

    def assert_matters(self, name: str, request: GenerationRequest, **changes: Any) -> None:
        """Assert that the engine gives another image with other values."""
        first, second = (draw(self.engine(name), one)[0] for one in (request, replace(request, **changes)))
        assert psnr(first, second) < MIN_PSNR_DB


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    made = Models(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def tiny_request(*adapters: AdapterFile, **fields: Any) -> GenerationRequest:
    """Build a short request in the tiny checkpoints' native size."""
    return request_of(**{"width": 64, "height": 64, "num_inference_steps": 2, "adapters": adapters} | fields)


# --- Alone


@pytest.mark.parametrize(
    ("name", "negative_prompt"),
    on_gpu(
        long_but(
            [
                (name, negative)
                for name in ("sd", "sdxl", "sdxl_without_zeros", "z_image", "z_image_dynamic")
                for negative in ("", "blurry")
            ],
            ("sd", "blurry"),
            # It begins with zeros where there is no negative prompt, unless its pipeline says otherwise.
            ("sdxl", ""),
            ("sdxl", "blurry"),
            ("sdxl_without_zeros", ""),
            ("z_image", "blurry"),
            ("z_image_dynamic", ""),
        ),
        ("sdxl", ""),
        ("sdxl", "blurry"),
        ("z_image", "blurry"),
    ),
)
def test_a_guided_image_equals_plain_diffusers(models: Models, name: str, negative_prompt: str) -> None:
    models.assert_equal(name, tiny_request(negative_prompt=negative_prompt))


@pytest.mark.parametrize(("name", "scale"), [("sd", 1.0), ("sdxl", 1.0), ("z_image", 0.0)])
def test_an_unguided_image_equals_plain_diffusers(models: Models, name: str, scale: float) -> None:
    models.assert_equal(name, tiny_request(guidance_scale=scale))


@pytest.mark.parametrize(("name", "scale"), [("sdxl", 1.5), ("z_image", 0.5)])
def test_guidance_begins_where_the_family_s_pipeline_lets_it_begin(models: Models, name: str, scale: float) -> None:
    models.assert_equal(name, tiny_request(guidance_scale=scale))


@pytest.mark.parametrize(
    ("name", "width", "height"),
    on_gpu([("sdxl", 104, 56), ("z_image", 112, 48), ("z_image_dynamic", 112, 48)], ("z_image", 112, 48)),
)
def test_an_image_that_is_not_square_equals_plain_diffusers(models: Models, name: str, width: int, height: int) -> None:
    request = tiny_request(width=width, height=height)

    assert draw(models.engine(name), request)[0].size == (width, height)
    models.assert_equal(name, request)


@pytest.mark.parametrize("values", [{"cfg_truncation": 0.5}, {"cfg_normalization": 0.7}], ids=str)
def test_z_image_s_own_settings_of_guidance_do_what_they_do_in_its_pipeline(
    models: Models, values: dict[str, float]
) -> None:
    request = tiny_request(guidance_scale=5.0, num_inference_steps=6, **values)

    models.assert_equal("z_image", request)
    models.assert_matters("z_image", request, cfg_normalization=0.0, cfg_truncation=1.0)


def test_the_other_families_refuse_z_image_s_settings_of_guidance(models: Models) -> None:
    with pytest.raises(RequestFailed, match="cfg_truncation") as failure:
        draw(models.engine("sdxl"), tiny_request(cfg_truncation=0.5))

    assert failure.value.code == "INVALID_INPUT"


@pytest.mark.parametrize("name", ["sd", "sdxl", "z_image"])
def test_prompts_of_the_tiny_models_change_their_images(models: Models, name: str) -> None:
    """Else none of these tests would see a wrong prompt."""
    request = tiny_request()
    models.assert_matters(name, request, prompt="a blue house")
    models.assert_matters(name, request, negative_prompt="")


# --- Schedulers


@pytest.mark.parametrize(
    ("name", "scheduler"),
    on_gpu(
        long_but(
            [(name, one) for name, table in SCHEDULERS.items() for one in table],
            # SDXL's are of the same code, and its batches below mix them.
            *[("sd", one) for one in DIFFUSION_CHOICES],
            *[("z_image", one) for one in FLOW_CHOICES],
            ("z_image_dynamic", "unipc"),
        ),
        *[("z_image", one) for one in FLOW_CHOICES],
    ),
)
def test_every_scheduler_gives_the_image_plain_diffusers_gives_with_it(
    models: Models, name: str, scheduler: str
) -> None:
    models.assert_equal(name, tiny_request(scheduler=scheduler, num_inference_steps=3))


@pytest.mark.parametrize(("name", "default"), [("sd", "dpm++"), ("sdxl", "euler"), ("z_image", "euler")])
def test_unknown_scheduler_is_refused_with_the_family_s_list(models: Models, name: str, default: str) -> None:
    engine = models.engine(name)

    with pytest.raises(RequestFailed) as failure:
        draw(engine, tiny_request(scheduler="plms"))

    assert failure.value.code == "INVALID_INPUT"
    assert set(engine.facts.schedulers) == set(SCHEDULERS[name])
    assert str(failure.value).endswith(f"known are {', '.join(engine.facts.schedulers)}")
    call = EngineCall(engine, tiny_request(num_inference_steps=2))
    assert call.future.result().scheduler == default


def test_more_steps_than_a_scheduler_can_take_are_refused_and_the_engine_goes_on(models: Models) -> None:
    with pytest.raises(RequestFailed, match="60 steps") as failure:
        draw(models.engine("sdxl"), tiny_request(scheduler="lcm", num_inference_steps=60))

    assert failure.value.code == "INVALID_INPUT"
    models.assert_equal("sdxl", tiny_request(scheduler="lcm"))


# --- Many at once


def sd_batch(models: Models, folder: Path) -> list[GenerationRequest]:
    def adapter(name: str, **kind: Any) -> AdapterFile:
        return models.adapter("sd", folder / f"{name}.safetensors", **kind)

    few = adapter("few", layout="diffusers_new", rank=4, seed=1)
    texts = adapter("texts", layout="kohya", rank=6, alpha=3, seed=2, text_encoder=True, scale=0.8)
    every = adapter("every", layout="diffusers_old", rank=5, seed=3, targets=EVERY_LAYER)
    return [
        tiny_request(few, scheduler="euler_a", seeds=(1,)),
        tiny_request(texts, num_inference_steps=6, negative_prompt="", seeds=(2,)),
        tiny_request(every, num_inference_steps=4, guidance_scale=1.0, scheduler="heun", seeds=(3,)),
        tiny_request(num_inference_steps=5, prompt=LONG[:70], guidance_scale=6.0, scheduler="ddim", seeds=(4,)),
        tiny_request(few, replace(every, scale=0.4), num_inference_steps=4, scheduler="unipc", seeds=(5,)),
        tiny_request(negative_prompt="dark and dull", scheduler="lcm", seeds=(6,)),
    ]


SDXL_ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("few", {"layout": "diffusers_new", "rank": 4, "seed": 1}),
    ("texts", {"layout": "diffusers_new", "rank": 6, "alpha": 3, "seed": 2, "text_encoder": True, "scale": 0.8}),
]


def sdxl_batch(models: Models, folder: Path) -> list[GenerationRequest]:
    def adapter(name: str, **kind: Any) -> AdapterFile:
        return models.adapter("sdxl", folder / f"{name}.safetensors", **kind)

    few, texts = (adapter(name, **kind) for name, kind in SDXL_ADAPTERS)
    every = adapter("every", layout="kohya", rank=5, alpha=4, seed=3, targets=EVERY_LAYER, text_encoder=True)
    return [
        tiny_request(few, scheduler="euler_a", seeds=(1,)),
        tiny_request(texts, num_inference_steps=6, negative_prompt="", seeds=(2,)),
        tiny_request(every, num_inference_steps=4, guidance_scale=1.0, scheduler="dpm++", seeds=(3,)),
        tiny_request(num_inference_steps=5, prompt=LONG[:70], guidance_scale=6.0, negative_prompt="", seeds=(4,)),
        tiny_request(few, replace(every, scale=0.4), num_inference_steps=4, scheduler="unipc", seeds=(5,)),
        tiny_request(negative_prompt="dark and dull", scheduler="heun", seeds=(6,)),
    ]


def four_of_sdxl(models: Models, folder: Path) -> list[GenerationRequest]:
    """Build the requests of the batch that need the fewest adapters."""
    few, texts = (models.adapter("sdxl", folder / f"{name}.safetensors", **kind) for name, kind in SDXL_ADAPTERS)
    return [
        tiny_request(few, scheduler="euler_a", seeds=(1,)),
        tiny_request(texts, num_inference_steps=4, negative_prompt="", seeds=(2,)),
        tiny_request(num_inference_steps=3, prompt=LONG[:70], guidance_scale=1.0, scheduler="dpm++", seeds=(3,)),
        tiny_request(negative_prompt="dark and dull", scheduler="heun", seeds=(4,)),
    ]


def z_image_batch(models: Models, folder: Path) -> list[GenerationRequest]:
    def adapter(name: str, **kind: Any) -> AdapterFile:
        return models.adapter("z_image", folder / f"{name}.safetensors", **kind)

    few = adapter("few", layout="diffusers_new", rank=4, seed=1)
    blocks = adapter("blocks", layout="diffusers_new", rank=6, alpha=3, seed=2, targets=Z_IMAGE_BLOCKS, scale=0.8)
    every = adapter("every", layout="diffusers_new", rank=5, seed=3, targets=Z_IMAGE_EVERY_LAYER)
    # All but the first have areas alike and share their forwards, some as 32 tokens, some filled up to 64.
    return [
        tiny_request(few, scheduler="lcm", seeds=(1,)),
        tiny_request(blocks, num_inference_steps=6, width=80, height=96, negative_prompt="", seeds=(2,)),
        tiny_request(every, num_inference_steps=4, width=112, height=80, guidance_scale=0.0, seeds=(3,)),
        tiny_request(
            few,
            replace(every, scale=0.4),
            num_inference_steps=5,
            width=64,
            height=128,
            prompt=LONG,
            guidance_scale=6.0,
            cfg_normalization=0.8,
            scheduler="unipc",
            seeds=(4,),
        ),
        tiny_request(
            num_inference_steps=4,
            width=96,
            height=96,
            cfg_truncation=0.5,
            scheduler="heun",
            prompt="언덕 위의 여우",
            seeds=(5,),
        ),
        tiny_request(every, width=144, height=48, scheduler="dpm++", seeds=(6,)),
    ]


@pytest.mark.parametrize(
    ("name", "batch"),
    on_gpu(
        # Of Stable Diffusion, `engine/test_batching.py` has one.
        long_but(
            [("sd", sd_batch), ("sdxl", sdxl_batch), ("sdxl", four_of_sdxl), ("z_image", z_image_batch)],
            ("sdxl", four_of_sdxl),
            ("z_image", z_image_batch),
        ),
        ("z_image", z_image_batch),
    ),
    ids=["sd", "sdxl", "four of sdxl", "z_image"],
)
def test_requests_that_share_nothing_give_together_what_each_gives_alone(
    models: Models, tmp_path: Path, name: str, batch: Callable[[Models, Path], list[GenerationRequest]]
) -> None:
    engine = models.engine(name)
    requests = batch(models, tmp_path)
    engine.model.batches.clear()
    start = len(engine.turns)

    calls = submit_together(engine, requests)

    assert_right(models.checkpoint(name), calls)
    assert max(turn.num_batched for turn in engine.turns[start:]) >= 4
    if name == "z_image":
        together = [{_size(lane.owner.request) for lane in lanes} for lanes in engine.model.batches]
        assert max(map(len, together)) == 5
        assert all(sizes == {(64, 64)} for sizes in together if (64, 64) in sizes), "the small one goes alone"


def _size(request: GenerationRequest) -> tuple[int, int]:
    return request.width, request.height


def assert_right(checkpoint: Path, calls: list[EngineCall]) -> None:
    """Assert that every image is the one that plain diffusers draws for its request alone."""
    ratios = {call.request.seeds: psnr(call.image, alone(checkpoint, call.request)) for call in calls}
    assert {seeds: ratio for seeds, ratio in ratios.items() if ratio < SAME_DB} == {}


# --- Adapters


@pytest.mark.parametrize(
    ("name", "targets", "layout"),
    on_gpu(
        # SDXL's batch above has the layers of attention and of the text encoders, and by kohya's names every one.
        long_but(
            [
                ("sdxl", EVERY_LAYER, "diffusers_new"),
                ("z_image", Z_IMAGE_EVERY_LAYER, "diffusers_new"),
                ("z_image", Z_IMAGE_EVERY_LAYER, "kohya"),
            ],
            ("z_image", Z_IMAGE_EVERY_LAYER, "diffusers_new"),
        ),
        ("sdxl", EVERY_LAYER, "diffusers_new"),
        ("z_image", Z_IMAGE_EVERY_LAYER, "diffusers_new"),
    ),
    ids=lambda value: "" if isinstance(value, tuple) else value,
)
def test_an_adapter_of_every_layer_equals_plain_diffusers(
    models: Models, tmp_path: Path, name: str, targets: tuple[str, ...], layout: Layout
) -> None:
    kind: dict[str, Any] = {"layout": layout, "rank": 6, "alpha": 4, "targets": targets, "seed": 5}
    file = models.adapter(name, tmp_path / "every.safetensors", text_encoder=name == "sdxl", **kind)
    request = tiny_request(replace(file, scale=0.9))

    models.assert_equal(name, request)
    with_it, without = (draw(models.engine(name), one)[0] for one in (request, replace(request, adapters=())))
    assert psnr(with_it, without) < DIFFERENT_DB


@pytest.mark.parametrize("layout", ["diffusers_new", pytest.param("kohya", marks=long)])
def test_an_adapter_of_another_family_fails_before_any_step(models: Models, tmp_path: Path, layout: Layout) -> None:
    sd = load_pipe(build_tiny_sd(tmp_path / "sd"))
    weights = write_adapter(tmp_path / "sd.safetensors", sd, layout=layout, text_encoder=True)
    steps: list[Any] = []

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine("z_image"), tiny_request(AdapterFile(weights, None, 1.0)), steps)

    assert failure.value.code == "LORA_INCOMPATIBLE"
    assert steps == []


# --- Prompts


def test_a_syllable_of_hangul_makes_another_image_of_z_image_s(models: Models) -> None:
    request = tiny_request(prompt="눈 덮인 산의 여우", guidance_scale=6.0)

    models.assert_equal("z_image", request)
    models.assert_equal("z_image", replace(request, prompt="눈 덮인 강의 여우"))
    models.assert_matters("z_image", request, prompt="눈 덮인 강의 여우")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_z_image_reads_512_tokens_to_the_last_and_refuses_one_more(models: Models, field: str) -> None:
    tokenizer = load_pipe(models.checkpoint("z_image")).tokenizer
    chat = [{"role": "user", "content": ""}]
    own = len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids)
    longest = "".join("fox and hill"[i % 12] for i in range(LONGEST_CAPTION - own))
    request, too_long = (tiny_request(**{field: text}, guidance_scale=6.0) for text in (longest, f"{longest}!"))
    steps: list[Any] = []

    with pytest.raises(RequestFailed) as failure:
        draw(models.engine("z_image"), too_long, steps)

    assert failure.value.code == "INVALID_PROMPT"
    assert "513" in str(failure.value)
    assert "512" in str(failure.value)
    assert steps == []
    models.assert_equal("z_image", request)


# SDXL's embeddings are held against compel's in `test_clip_prompts.py`.
@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=long)])
def test_a_prompt_of_three_hundred_tokens_is_read_to_its_end_as_compel_reads_it(models: Models, name: str) -> None:
    request = tiny_request(prompt=LONG)

    drawn = draw(models.engine(name), request)[0]

    assert psnr(drawn, with_compel(models.checkpoint(name), request)) >= SAME_DB
    other = replace(request, prompt=OTHER_END)
    drawn_other = draw(models.engine(name), other)[0]
    assert psnr(drawn_other, with_compel(models.checkpoint(name), other)) >= SAME_DB
    assert psnr(drawn, drawn_other) < SAME_DB


@pytest.mark.parametrize("name", on_gpu(long_but(["sd", "sdxl"], "sd"), "sd"))
def test_lanes_with_long_and_short_prompts_share_forwards_and_each_is_right(models: Models, name: str) -> None:
    engine = models.engine(name)
    requests = [
        tiny_request(prompt=LONG),
        tiny_request(prompt=LONG, guidance_scale=1.0, seeds=(2,)),
        tiny_request(prompt="a hill", negative_prompt=OTHER_END, scheduler="euler_a", seeds=(3,)),
        tiny_request(prompt=LONG[:140], negative_prompt=LONG[:200], seeds=(4,)),
        tiny_request(prompt="a hill", num_inference_steps=3, seeds=(5,)),
    ]
    start = len(engine.turns)

    calls = submit_together(engine, requests)

    checkpoint = models.checkpoint(name)
    ratios = [psnr(call.image, with_compel(checkpoint, call.request)) for call in calls[:-1]]
    assert min(ratios) >= SAME_DB, ratios
    assert_right(checkpoint, calls[-1:])
    assert max(turn.num_batched for turn in engine.turns[start:]) >= 4


def with_compel(checkpoint: Path, request: GenerationRequest) -> Any:
    """Draw with plain diffusers from the embeddings that compel's own wrapper makes of the prompts."""
    return alone(checkpoint, request, **embeddings_by_compel(pipe_with(checkpoint), request))


# --- What a lane costs the device beside its forward


class CountedSampler:
    """A lane's sampler. `num_inputs`: how often it was asked for the model's input."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.num_inputs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def model_input(self) -> torch.Tensor:
        self.num_inputs += 1
        return self._sampler.model_input()


def guided_lane(model: Family) -> Lane:
    """Prepare a lane that has not joined, with its conditioning alone."""
    request = tiny_request(scheduler="euler", num_inference_steps=4, **model.guided_fields)
    active = ActiveRequest(request, model.batch_traits(request), lambda _: None, lambda: False, ())
    with torch.inference_mode():
        active.conditioning = Conditioning(*model.encode([Prompt("a hill"), Prompt("dark")], [(), ()]))
    return active.lanes[0]


@pytest.mark.parametrize("name", ["sd", "sdxl", "z_image", "flux", "flux_2"])
def test_a_guided_lane_s_input_is_made_once_for_both_of_its_rows(models: Models, name: str) -> None:
    model = models.engine(name).model
    lane = guided_lane(model)
    sampler = CountedSampler(model.begin(lane)[1])
    lane.sampler = cast(Sampler, sampler)

    with torch.inference_mode():
        model.denoise([lane])

    assert sampler.num_inputs == 1


@pytest.mark.parametrize("name", ["sd", "sdxl", "z_image", "flux", "flux_2"])
def test_a_lane_joins_without_waiting_for_the_device(
    models: Models, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.engine(name).model
    lane = guided_lane(model)
    monkeypatch.setattr(model, "device", NOWHERE)

    with Copies() as copies:
        model.begin(lane)

    assert copies.num_async > 0
    assert not copies.blocking
