"""Requests of many styles, ages and shapes in one batch: each picture is the one that its request alone would give."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from inference.errors import RequestFailed
from inference.lora.layers import layer_groups
from inference.request import AdapterFile, EngineLoad, GenerationRequest
from tests.support.engine.engine_requests import request_of
from tests.support.engine.watched_engine import (
    PATIENCE_SECONDS,
    EngineCall,
    WatchedEngine,
    arriving_together,
    submit_together,
)
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, demo_adapter, psnr, solo
from tests.support.long import long
from tests.support.models.tiny_models import EVERY_LAYER, build_tiny_sd, load_pipe, write_adapter
from tests.support.paths import DEMO_MODEL

pytestmark = pytest.mark.usefixtures("one_thread")

# Another batch adds up in another order, and that is all it may do.
SAME_DB = 60.0

# One of every kind that is trained, by name.
ADAPTERS: dict[str, dict[str, Any]] = {
    "old": {"layout": "diffusers_old", "rank": 4},
    "five": {"layout": "diffusers_new", "rank": 5},
    "text": {"layout": "diffusers_new", "rank": 6, "text_encoder": True},
    "eight": {"layout": "diffusers_new", "rank": 8},
    "every": {"layout": "diffusers_new", "rank": 10, "targets": EVERY_LAYER},
    "kohya": {"layout": "kohya", "rank": 12, "alpha": 6, "text_encoder": True},
    "convolutions": {"layout": "kohya", "rank": 3, "alpha": 6, "targets": ("conv1", "conv2", "time_emb_proj")},
    "folder": {"layout": "peft_folder", "rank": 20, "alpha": 16},
    "everything": {"layout": "diffusers_new", "rank": 32, "targets": EVERY_LAYER, "text_encoder": True},
    "sixty_four": {"layout": "diffusers_new", "rank": 64},
}


class Adapters(dict[str, AdapterFile]):
    """The adapters above, each written when it is first asked for, at scale 1."""

    def __init__(self, folder: Path, pipe: Any) -> None:
        super().__init__()
        self._folder, self._pipe = folder, pipe

    def __missing__(self, name: str) -> AdapterFile:
        kind, seed = ADAPTERS[name], 1 + list(ADAPTERS).index(name)
        path = write_adapter(self._folder / f"{name}.safetensors", self._pipe, seed=seed, **kind)
        is_folder = kind["layout"] == "peft_folder"
        weights = path / "adapter_model.safetensors" if is_folder else path
        self[name] = AdapterFile(weights, path / "adapter_config.json" if is_folder else None, 1.0)
        return self[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny checkpoint with random weights."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Write adapters for the tiny checkpoint."""
    return Adapters(tmp_path_factory.mktemp("adapters"), load_pipe(tiny))


@pytest.fixture
def engine(tiny: Path) -> Iterator[WatchedEngine]:
    """Start the engine on the tiny checkpoint, with room for sixteen lanes."""
    made = WatchedEngine(tiny, MAX_CONCURRENT_GENERATIONS=16)
    yield made
    made.close()


def tiny_request(*adapters: AdapterFile, **fields: Any) -> GenerationRequest:
    """Build a request of few steps in the tiny checkpoint's native size."""
    return request_of(**{"width": 64, "height": 64, "num_inference_steps": 3, "adapters": adapters} | fields)


def at_scale(file: AdapterFile, scale: float) -> AdapterFile:
    return replace(file, scale=scale)


def assert_right(checkpoint: Path, calls: list[EngineCall]) -> None:
    """Assert that every image is the one that plain diffusers draws for its request alone."""
    ratios = {
        f"{number} {call.request.request_id} seed {seed}": psnr(image, solo(checkpoint, call.request, seed=seed))
        for number, call in enumerate(calls)
        for image, seed in zip(call.images, call.request.seeds, strict=True)
    }
    assert {name: ratio for name, ratio in ratios.items() if ratio < MIN_PSNR_DB} == {}


def assert_styled(engine: WatchedEngine, calls: list[EngineCall]) -> None:
    """Assert that every image is far from what its request would give without its adapters."""
    styled = [call for call in calls if call.request.adapters]
    bare = submit_together(engine, [replace(call.request, adapters=()) for call in styled])
    ratios = {one.request.adapters: psnr(one.image, other.image) for one, other in zip(styled, bare, strict=True)}
    assert {files: ratio for files, ratio in ratios.items() if ratio >= DIFFERENT_DB} == {}


def six_requests(adapters: Adapters) -> list[GenerationRequest]:
    """Build requests that share nothing but the model."""
    return [
        tiny_request(adapters["old"], guidance_scale=9.0, scheduler="euler_a", seeds=(1,)),
        tiny_request(num_inference_steps=5, guidance_scale=7.5, prompt="no style", negative_prompt="", seeds=(2,)),
        tiny_request(
            at_scale(adapters["eight"], 0.7),
            at_scale(adapters["five"], 0.4),
            num_inference_steps=4,
            scheduler="ddim",
            negative_prompt="ugly",
            seeds=(3,),
        ),
        tiny_request(
            adapters["every"], num_inference_steps=4, scheduler="dpm++_karras", guidance_scale=2.0, seeds=(4,)
        ),
        tiny_request(adapters["kohya"], num_inference_steps=4, scheduler="unipc", negative_prompt="dark", seeds=(5,)),
        tiny_request(adapters["folder"], num_inference_steps=5, guidance_scale=1.0, prompt="a blue house", seeds=(6,)),
    ]


def ten_requests(adapters: Adapters) -> list[GenerationRequest]:
    """Build the six and four more, of every other adapter."""
    return [
        *six_requests(adapters),
        tiny_request(at_scale(adapters["text"], 0.8), num_inference_steps=6, guidance_scale=5.0, seeds=(7,)),
        tiny_request(at_scale(adapters["sixty_four"], 0.9), scheduler="euler", seeds=(8,)),
        tiny_request(
            adapters["everything"], num_inference_steps=4, guidance_scale=1.0, scheduler="euler_a", seeds=(9,)
        ),
        tiny_request(at_scale(adapters["convolutions"], 1.3), num_inference_steps=8, guidance_scale=4.0, seeds=(10,)),
    ]


# --- Many styles at once


@pytest.mark.parametrize("made", [six_requests, pytest.param(ten_requests, marks=long)])
def test_requests_with_styles_of_their_own_at_once_give_the_images_that_each_gives_alone(
    tiny: Path,
    adapters: Adapters,
    engine: WatchedEngine,
    made: Callable[[Adapters], list[GenerationRequest]],
) -> None:
    start = len(engine.turns)

    calls = submit_together(engine, made(adapters))

    assert_right(tiny, calls)
    forwards = [turn.num_batched for turn in engine.turns[start:] if turn.num_batched]
    assert sum(forwards) / len(forwards) >= 4
    assert_styled(engine, calls)


@long
def test_the_demo_model_s_styles_share_a_batch_at_scales_of_their_own() -> None:
    engine = WatchedEngine(DEMO_MODEL / "checkpoint")

    calls = submit_together(
        engine,
        [
            request_of(adapters=(demo_adapter("neon"),), prompt="neon: a castle", num_inference_steps=3),
            request_of(adapters=(demo_adapter("neon", 0.5),), prompt="neon: a castle", num_inference_steps=3),
            request_of(adapters=(demo_adapter("sepia", -0.7),), guidance_scale=1.0, num_inference_steps=3),
            request_of(
                adapters=(demo_adapter("blueprint"), demo_adapter("sepia", 0.4)),
                scheduler="euler_a",
                num_inference_steps=3,
            ),
            request_of(seeds=(7,), num_inference_steps=4),
        ],
    )

    assert_right(DEMO_MODEL / "checkpoint", calls)
    assert psnr(calls[0].image, calls[1].image) < DIFFERENT_DB
    assert_styled(engine, calls)
    engine.close()


# --- Joining


def test_a_request_joins_at_the_next_step_and_the_others_images_do_not_change(
    tiny: Path, adapters: Adapters, engine: WatchedEngine
) -> None:
    residents = [
        tiny_request(adapters["old"], num_inference_steps=8, seeds=(1,)),
        tiny_request(adapters["every"], num_inference_steps=9, seeds=(2,), scheduler="euler_a"),
        tiny_request(num_inference_steps=10, seeds=(3,), guidance_scale=1.0),
    ]
    undisturbed = submit_together(engine, residents)
    before = [call.image for call in undisturbed]
    newcomers: list[EngineCall] = []
    turn_when_ready: list[int] = []
    turn_when_joined: list[int] = []

    def come() -> None:
        newcomer = tiny_request(adapters["everything"], seeds=(4,))
        newcomers.append(EngineCall(engine, newcomer, at={0: lambda: turn_when_joined.append(len(engine.turns))}))

    def be_ready() -> None:
        engine.wait_until_prepared()
        turn_when_ready.append(len(engine.turns))

    with arriving_together(engine):
        calls = [EngineCall(engine, residents[0], at={3: come, 4: be_ready})]
        calls += [EngineCall(engine, request) for request in residents[1:]]

    after = [call.image for call in calls]
    assert_right(tiny, newcomers)
    assert turn_when_joined[0] - turn_when_ready[0] <= 2
    batched = [turn.num_batched for turn in engine.turns[turn_when_ready[0] :]]
    assert batched[:3] in ([3, 4, 4], [3, 3, 4])
    assert all(psnr(one, other) >= SAME_DB for one, other in zip(before, after, strict=True))


def test_a_place_that_becomes_free_is_taken_in_the_very_next_turn(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the engine waits to be woken although somebody is ready, it now waits for ever.
    monkeypatch.setattr("inference.engine.local_engine.POLL_SECONDS", 3600.0)
    engine = WatchedEngine(tiny, MAX_CONCURRENT_GENERATIONS=1)

    calls = [EngineCall(engine, tiny_request(seeds=(seed,), num_inference_steps=2)) for seed in range(3)]

    assert [call.image.size for call in calls] == [(64, 64)] * 3
    engine.close()


# --- Shapes, and pictures of one request


def test_two_shapes_take_turns_and_neither_spoils_the_other(
    tiny: Path, adapters: Adapters, engine: WatchedEngine
) -> None:
    requests = [
        tiny_request(adapters["old"], seeds=(1,)),
        tiny_request(adapters["every"], seeds=(2,), width=96),
        tiny_request(seeds=(3,), width=96, scheduler="euler_a"),
        tiny_request(adapters["kohya"], seeds=(4,)),
    ]

    calls = submit_together(engine, requests)

    assert_right(tiny, calls)
    assert calls[1].image.size == (96, 64)
    steps = [{lane.shape for lane in batch} for batch in engine.model.batches]
    assert all(len(shapes) == 1 for shapes in steps)
    last_wide = max(i for i, shapes in enumerate(steps) if shapes == {(64, 96)})
    first_wide = min(i for i, shapes in enumerate(steps) if shapes == {(64, 96)})
    assert last_wide - first_wide == 4, "three turns each, one after the other"


def test_three_images_in_two_lanes_match_their_seeds_and_every_step_is_reported_once(
    tiny: Path, adapters: Adapters
) -> None:
    engine = WatchedEngine(tiny, MAX_CONCURRENT_GENERATIONS=2)

    forwards_when_reported: list[int] = []

    call = EngineCall(
        engine,
        tiny_request(adapters["text"], seeds=(5, 3, 4), num_inference_steps=3),
        at={3: lambda: forwards_when_reported.append(len(engine.model.batches))},
    )

    assert_right(tiny, [call])
    assert [report.step_index for report in call.steps] == list(range(4))
    assert max(len(batch) for batch in engine.model.batches) == 2
    assert forwards_when_reported == [len(engine.model.batches)] == [6], (
        "the last step is told when the last lane did it"
    )
    engine.close()


# --- More styles than slots


def test_more_styles_than_slots_are_each_drawn_right_and_never_touch_the_others(tiny: Path, adapters: Adapters) -> None:
    engine = WatchedEngine(tiny, ADAPTER_SLOTS=4)
    names = ["sixty_four", "every", "old", "kohya", "folder", "every", "five"]
    adapters_of_rows = [[at_scale(adapters[name], 1.0 if name == "folder" else 0.9)] for name in names]
    adapters_of_rows.append([adapters["old"], at_scale(adapters["sixty_four"], 0.5)])
    adapters_of_rows.append([adapters["every"], at_scale(adapters["kohya"], 0.5), adapters["five"]])
    requests = [
        tiny_request(*files, num_inference_steps=3, seeds=(seed,)) for seed, files in enumerate(adapters_of_rows)
    ]

    def controls() -> list[bytes]:
        """Draw alone an image without an adapter, and one whose adapter is evicted in between."""
        controlled = (tiny_request(*files, num_inference_steps=2, seeds=(9,)) for files in ((), (adapters["every"],)))
        return [EngineCall(engine, request).image.tobytes() for request in controlled]

    before = controls()
    first = [EngineCall(engine, request) for request in requests[:4]]
    assert_right(tiny, first)
    during = controls()
    second = [EngineCall(engine, request) for request in requests[4:]]
    assert_right(tiny, second)
    after = controls()

    assert before == during == after
    assert max(turn.slots_active + turn.slots_idle for turn in engine.turns) == 4
    engine.close()


def test_a_style_that_takes_over_another_s_pages_brings_layers_that_one_lacked(tiny: Path, adapters: Adapters) -> None:
    engine = WatchedEngine(tiny, ADAPTER_SLOTS=4)
    staying = [
        tiny_request(adapters[name], num_inference_steps=7, seeds=(seed,))
        for seed, name in enumerate(("old", "five", "eight"))
    ]
    leaving = tiny_request(adapters["text"], num_inference_steps=4, seeds=(3,))
    coming: list[EngineCall] = []

    def come() -> None:
        # Its prompts are known, and it takes the only slot and the place in the batch that become free.
        coming.append(EngineCall(engine, tiny_request(adapters["convolutions"], seeds=(4,))))

    with arriving_together(engine):
        calls = [EngineCall(engine, request) for request in staying]
        calls.append(EngineCall(engine, leaving, at={2: come, 3: engine.wait_until_prepared}))

    assert_right(tiny, [*calls[2:], *coming])
    engine.close()


# --- Adapters as they come


def test_an_adapter_over_the_rank_limit_is_refused_by_name_of_both_ranks(tiny: Path, adapters: Adapters) -> None:
    engine = WatchedEngine(tiny, ADAPTER_MAX_RANK=8)

    refused = EngineCall(engine, tiny_request(adapters["sixty_four"]))
    accepted = EngineCall(engine, tiny_request(adapters["eight"]))

    assert isinstance(refused.error, RequestFailed)
    assert refused.error.code == "LORA_UNSUPPORTED"
    assert "rank 64" in str(refused.error)
    assert "up to 8" in str(refused.error)
    assert refused.steps == []
    assert_right(tiny, [accepted])
    engine.close()


def test_adapters_that_are_more_than_the_pages_hold_together_are_refused_rather_than_waited_for(
    tiny: Path, adapters: Adapters
) -> None:
    pipe = load_pipe(tiny)
    groups = layer_groups({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    page_bytes = 4 * sum(group.width for group in groups)
    # Pages for rank 64, and the zero page.
    engine = WatchedEngine(tiny, ADAPTER_MAX_RANK=64, ADAPTER_MEMORY_GB=9.5 * page_bytes / 1e9)

    refused = EngineCall(engine, tiny_request(adapters["sixty_four"], adapters["eight"]))
    accepted = [EngineCall(engine, tiny_request(adapters[name])) for name in ("sixty_four", "eight")]

    assert isinstance(refused.error, RequestFailed)
    assert refused.error.code == "LORA_UNSUPPORTED"
    assert "ranks 72 together; this worker holds 64 at once (ADAPTER_MEMORY_GB)" in str(refused.error)
    assert_right(tiny, accepted)
    assert engine.model.bank.num_bytes <= 9.5 * page_bytes
    engine.close()


@pytest.mark.parametrize("way", ["renamed onto it", pytest.param("written over it", marks=long)])
def test_an_adapter_that_is_replaced_under_its_path_is_another_adapter(
    tiny: Path, adapters: Adapters, engine: WatchedEngine, tmp_path: Path, way: str
) -> None:
    file = AdapterFile(tmp_path / "style.safetensors", None, 1.0)
    other = tmp_path / "other.safetensors"
    file.weights.write_bytes(adapters["text"].weights.read_bytes())
    write_adapter(other, load_pipe(tiny), seed=99, **ADAPTERS["text"])
    assert other.stat().st_size == file.weights.stat().st_size
    first = EngineCall(engine, tiny_request(file))
    assert first.image.size == (64, 64)

    if way == "renamed onto it":
        other.replace(file.weights)
    else:
        file.weights.write_bytes(other.read_bytes())
    second = EngineCall(engine, tiny_request(file))

    assert_right(tiny, [second])
    assert psnr(first.image, second.image) < DIFFERENT_DB


def test_an_adapter_of_one_version_is_read_once_however_its_file_is_touched(
    tiny: Path, adapters: Adapters, engine: WatchedEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference.engine.preparer")
    path = tmp_path / "style.safetensors"
    path.write_bytes(adapters["text"].weights.read_bytes())
    file = AdapterFile(path, None, 1.0, version="etag-1")

    together = submit_together(engine, [tiny_request(file, seeds=(seed,)) for seed in range(3)])
    assert_right(tiny, together[:1])
    os.utime(path, (1, 1))
    later = EngineCall(engine, tiny_request(file, seeds=(7,)))
    assert_right(tiny, [later])

    assert num_readings(caplog) == 1
    assert slots_in_use(engine.turns[-1]) == 1


def test_another_version_under_the_same_path_is_another_adapter(
    tiny: Path, adapters: Adapters, engine: WatchedEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference.engine.preparer")
    path = tmp_path / "style.safetensors"
    path.write_bytes(adapters["text"].weights.read_bytes())
    first = EngineCall(engine, tiny_request(AdapterFile(path, None, 1.0, version="etag-1")))
    assert_right(tiny, [first])

    write_adapter(path, load_pipe(tiny), seed=99, **ADAPTERS["text"])
    second = EngineCall(engine, tiny_request(AdapterFile(path, None, 1.0, version="etag-2")))

    assert_right(tiny, [second])
    assert psnr(first.image, second.image) < DIFFERENT_DB
    assert num_readings(caplog) == 2


def num_readings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.message == "adapter read" for record in caplog.records)


def slots_in_use(engine_load: EngineLoad) -> int:
    return engine_load.slots_active + engine_load.slots_idle


# --- Conditioning


@pytest.fixture(scope="module")
def words(adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    """Write an adapter of the text encoder alone."""
    weights = tmp_path_factory.mktemp("words") / "words.safetensors"
    every = safetensors.torch.load_file(adapters["kohya"].weights)
    safetensors.torch.save_file({name: each for name, each in every.items() if name.startswith("lora_te_")}, weights)
    return AdapterFile(weights, None, 1.0)


def positive_of(engine: WatchedEngine, call: EngineCall) -> torch.Tensor:
    """Return the embedding of the call's prompt, as its lane had it."""
    call.future.result(PATIENCE_SECONDS)
    active = next(lane.owner for batch in engine.model.batches for lane in batch if lane.owner.future is call.future)
    assert active.conditioning is not None
    return active.conditioning.positive.tokens


def test_a_prompt_means_something_else_under_a_text_encoder_s_adapter_and_at_each_scale_of_it(
    tiny: Path, words: AdapterFile, engine: WatchedEngine
) -> None:
    requests = [tiny_request(), tiny_request(words), tiny_request(at_scale(words, 0.4)), tiny_request(words)]

    calls = submit_together(engine, requests)

    assert_right(tiny, calls)
    without, full, weak, again = (positive_of(engine, call) for call in calls)
    assert not torch.allclose(without, full, atol=1e-2)
    assert not torch.allclose(without, weak, atol=1e-2)
    assert not torch.allclose(full, weak, atol=1e-2)
    assert torch.equal(full, again)
    assert engine.model.encoded.count("a red fox") == 3, "without it, and at each scale; again is no more work"


def test_a_repeated_prompt_is_encoded_once_as_long_as_no_adapter_changes_its_meaning(
    adapters: Adapters, engine: WatchedEngine
) -> None:
    first = EngineCall(engine, tiny_request(prompt="a hill"))
    second = EngineCall(engine, tiny_request(adapters["every"], prompt="a hill", seeds=(2, 3)))
    third = EngineCall(engine, tiny_request(prompt="a hill", negative_prompt="a hill"))
    assert all(len(call.images) for call in (first, second, third))

    assert engine.model.encoded.count("a hill") == 1
    assert engine.model.encoded.count("blurry") == 1
    assert torch.equal(positive_of(engine, first), positive_of(engine, second))
