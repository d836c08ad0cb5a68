"""Many jobs in one batch, through a whole worker."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import MIN_PSNR_DB, demo_adapter, psnr, solo
from tests.support.long import long
from tests.support.paths import DEMO_MODEL, ROOT
from tests.support.world import Worker, World, eventually, new_world

LONG = 60
STYLES = ("neon", "blueprint", "sepia")
POISON = ROOT / "tests" / "poison"


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def lasting_world(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """Start a world with a worker that is ready, for tests after which it is as good as new."""
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        ready(made.start_worker())
        yield made


def ready(worker: Worker) -> Worker:
    worker.wait_until_ready()
    return worker


def test_ten_jobs_of_several_styles_share_their_steps_and_come_out_as_alone(lasting_world: World) -> None:
    world, worker = lasting_world, lasting_world.workers[0]
    turns_before = worker.metric("darkroom_denoise_steps_total")
    for style in STYLES:
        world.upload_demo_adapter(style)
    asked = [
        request_of(
            prompt=f"{STYLES[number % 3]}: a castle",
            negative_prompt="",
            seeds=(number,),
            num_inference_steps=8 + number,
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
            num_inference_steps=one.num_inference_steps,
            guidance_scale=one.guidance_scale,
        )
        for one in asked
    ]

    worker.process.send_signal(signal.SIGCONT)
    assert {world.wait_for_end(job).kind for job in jobs} == {"complete"}

    num_turns = worker.metric("darkroom_denoise_steps_total") - turns_before
    assert sum(one.num_inference_steps for one in asked) / num_turns >= 4
    for job, one in zip(jobs, asked, strict=True):
        assert psnr(world.image(job), solo(DEMO_MODEL / "checkpoint", one)) >= MIN_PSNR_DB
    world.wait_until_clean()


def test_a_job_joins_those_that_are_running_and_ends_long_before_them(lasting_world: World) -> None:
    world, worker = lasting_world, lasting_world.workers[0]
    running = [world.publish(num_inference_steps=80, seed=number) for number in range(3)]
    for generation_id in running:
        world.wait_for_step(generation_id)

    late = world.publish(num_inference_steps=4)

    assert world.wait_for_end(late).kind == "complete"
    assert all(world.backend.ends(generation_id) == [] for generation_id in running)
    assert worker.metric("darkroom_lanes") == 3
    for generation_id in running:
        assert world.wait_for_end(generation_id).kind == "complete"
    assert worker.metric("darkroom_lanes") == 0


def test_a_cancelled_lane_leaves_the_others_running(lasting_world: World) -> None:
    world, worker = lasting_world, lasting_world.workers[0]
    steps_before = worker.metric("darkroom_denoise_lane_steps_total")
    jobs = [world.publish(num_inference_steps=LONG, seed=number) for number in range(3)]
    for generation_id in jobs:
        world.wait_for_step(generation_id)

    order = json.dumps({"generation_id": jobs[1]}).encode()
    connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url))
    connection.channel().basic_publish(f"{world.queue}.cancel", "", order)
    connection.close()

    end = world.wait_for_end(jobs[1])
    assert end.body["error_code"] == "CANCELLED"
    eventually(lambda: worker.metric("darkroom_lanes") == 2)
    assert [world.backend.ends(generation_id) for generation_id in (jobs[0], jobs[2])] == [[], []]
    for generation_id in (jobs[0], jobs[2]):
        assert world.wait_for_end(generation_id).kind == "complete"
    world.wait_until_clean()
    assert len(world.backend.ends(jobs[1])) == 1
    assert worker.metric("darkroom_denoise_lane_steps_total") - steps_before < 3 * LONG


@long
def test_poison_job_fails_alone_and_the_nine_others_of_its_batch_complete(world: World) -> None:
    # Given ten jobs in the queue, one of which kills the engine at its third step
    innocents = [world.publish(num_inference_steps=6, seed=number) for number in range(5)]
    poison = world.publish(prompt="poison", num_inference_steps=6)
    innocents += [world.publish(num_inference_steps=6, seed=number) for number in range(5, 9)]

    worker = ready(world.start_worker(PYTHONPATH=f"{POISON}{os.pathsep}{ROOT}"))

    # Then it fails, they complete, and the engine died once in company and twice over the culprit alone
    end = world.wait_for_end(poison)
    assert (end.kind, end.body["error_code"]) == ("failed", "ENGINE_CRASHED")
    for generation_id in innocents:
        assert world.wait_for_end(generation_id).kind == "complete"
    assert worker.metric("darkroom_engine_restarts_total") == 3
    world.wait_until_clean(dead=1)
    for generation_id in (*innocents, poison):
        assert len(world.backend.ends(generation_id)) == 1
