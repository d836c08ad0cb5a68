"""Many jobs in one batch, through a whole worker."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.request import GenerationRequest
from tests.live.test_cancelling import cancel
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import MIN_PSNR_DB, demo_adapter, pipe_with, plain, psnr
from tests.support.long import long
from tests.support.paths import DEMO_MODEL, ROOT
from tests.support.world import Worker, World, eventually, new_world

LONG = 60
STYLES = ("neon", "blueprint", "sepia")
POISON = ROOT / "tests" / "poison"


def test_ten_jobs_of_several_styles_share_their_steps_and_come_out_as_alone(world: World, worker: Worker) -> None:
    turns_before = worker.metric("darkroom_denoise_steps_total")
    for style in STYLES:
        world.upload_demo_adapter(style)
    asked = [
        request_of(
            prompt=f"{STYLES[number % 3]}: a castle",
            negative_prompt="",
            seeds=(number,),
            num_inference_steps=3 + number // 3,
            width=64,
            height=64,
            guidance_scale=1.0 + 0.5 * number,
            adapters=() if number == 9 else (demo_adapter(STYLES[number % 3], 0.5 + 0.1 * number),),
        )
        for number in range(10)
    ]
    # A worker that finds all ten in the queue
    worker.process.send_signal(signal.SIGSTOP)
    jobs = [
        world.publish(
            prompt=one.prompt,
            lora_path=f"models/{one.adapters[0].weights.name}" if one.adapters else "",
            lora_scale=one.adapters[0].scale if one.adapters else None,
            seed=one.seeds[0],
            width=one.width,
            height=one.height,
            num_inference_steps=one.num_inference_steps,
            guidance_scale=one.guidance_scale,
        )
        for one in asked
    ]

    worker.process.send_signal(signal.SIGCONT)
    assert {world.wait_for_end(job).kind for job in jobs} == {"complete"}

    num_turns = worker.metric("darkroom_denoise_steps_total") - turns_before
    assert sum(one.num_inference_steps for one in asked) / num_turns >= 4
    for job, expected in zip(jobs, drawn_alone(asked), strict=True):
        assert psnr(world.image(job), expected) >= MIN_PSNR_DB
    world.wait_until_clean()


def drawn_alone(asked: list[GenerationRequest]) -> list[Image.Image]:
    """Generate each with plain diffusers, where no adapter is active but the request's own."""
    pipe = pipe_with(DEMO_MODEL / "checkpoint", *map(demo_adapter, STYLES))
    images = []
    for one in asked:
        pipe.enable_lora()
        if one.adapters:
            (adapter,) = one.adapters
            pipe.set_adapters(f"adapter{STYLES.index(adapter.weights.stem)}", adapter.scale)
        else:
            pipe.disable_lora()
        images.append(plain(pipe, one))
    return images


def test_a_job_joins_those_that_are_running_and_ends_before_them_and_one_is_cancelled_alone(
    world: World, worker: Worker
) -> None:
    steps_before = worker.metric("darkroom_denoise_lane_steps_total")
    running = [world.publish(num_inference_steps=LONG, seed=number) for number in range(2)]
    for generation_id in running:
        world.wait_for_step(generation_id)

    # When another one comes, it ends long before them
    late = world.publish(num_inference_steps=4)
    assert world.wait_for_end(late).kind == "complete"
    assert all(world.backend.ends(generation_id) == [] for generation_id in running)
    assert worker.metric("darkroom_lanes") == 2

    # And when one of them is cancelled, the other goes on
    cancelled, other = running
    cancel(world, generation_id=cancelled)
    assert world.wait_for_end(cancelled).body["error_code"] == "CANCELLED"
    eventually(lambda: worker.metric("darkroom_lanes") == 1)
    assert world.backend.ends(other) == []
    assert world.wait_for_end(other).kind == "complete"
    world.wait_until_clean()
    eventually(lambda: worker.metric("darkroom_lanes") == 0)
    assert len(world.backend.ends(cancelled)) == 1
    assert worker.metric("darkroom_denoise_lane_steps_total") - steps_before < 2 * LONG + 4


@pytest.fixture
def poisoned_world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


@long
def test_poison_job_fails_alone_and_the_nine_others_of_its_batch_complete(poisoned_world: World) -> None:
    world = poisoned_world
    # Given ten jobs in the queue, one of which kills the engine at its third step
    innocents = [world.publish(num_inference_steps=6, seed=number) for number in range(5)]
    poison = world.publish(prompt="poison", num_inference_steps=6)
    innocents += [world.publish(num_inference_steps=6, seed=number) for number in range(5, 9)]

    worker = world.start_worker(PYTHONPATH=f"{POISON}{os.pathsep}{ROOT}")

    # Then it fails, they complete, and the engine died once in company and twice over the culprit alone
    end = world.wait_for_end(poison)
    assert (end.kind, end.body["error_code"]) == ("failed", "ENGINE_CRASHED")
    for generation_id in innocents:
        assert world.wait_for_end(generation_id).kind == "complete"
    assert worker.metric("darkroom_engine_restarts_total") == 3
    world.wait_until_clean(dead=1)
    for generation_id in (*innocents, poison):
        assert len(world.backend.ends(generation_id)) == 1
