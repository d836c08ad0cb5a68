"""Many jobs in one batch, through a whole worker."""

import json
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.pictures import MIN_PSNR_DB, psnr
from tests.world import Worker, World, eventually, new_world

LONG = 100
STYLES = ("neon", "blueprint", "sepia")
POISON = Path(__file__).parent / "poison"


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


def ready(worker: Worker) -> Worker:
    worker.wait_until_ready()
    return worker


def mean_batch(worker: Worker) -> float:
    return worker.metric("darkroom_denoise_lane_steps_total") / worker.metric("darkroom_denoise_steps_total")


def test_ten_jobs_of_several_styles_share_their_steps_and_come_out_as_alone(world: World) -> None:
    for style in STYLES:
        world.upload_demo_adapter(style)
    jobs = [
        {
            "prompt": f"{STYLES[number % 3]}: a castle",
            "lora_path": "" if number == 9 else f"models/{STYLES[number % 3]}.safetensors",
            "lora_scale": 0.5 + 0.1 * number,
            "seed": number,
            "num_inference_steps": 12 + 2 * number,
            "guidance_scale": 1.0 + 0.5 * number,
        }
        for number in range(10)
    ]
    # Given a worker that draws one after another
    alone = ready(world.start_worker(MAX_CONCURRENT_GENERATIONS="1"))
    one_by_one = [world.publish(**job) for job in jobs]
    assert {world.wait_for_end(job).kind for job in one_by_one} == {"complete"}
    assert mean_batch(alone) == 1
    alone.terminate()

    # When another finds all ten in the queue
    together = [world.publish(**job) for job in jobs]
    worker = ready(world.start_worker())
    assert {world.wait_for_end(job).kind for job in together} == {"complete"}

    # Then they shared their forwards, and every picture is the same
    assert mean_batch(worker) >= 4
    pictures = [(world.picture(one), world.picture(other)) for one, other in zip(one_by_one, together, strict=True)]
    assert min(psnr(one, other) for one, other in pictures) >= MIN_PSNR_DB
    assert psnr(pictures[0][1], pictures[1][1]) < MIN_PSNR_DB
    world.wait_until_clean()


def test_a_job_joins_those_that_are_running_and_ends_long_before_them(world: World) -> None:
    worker = ready(world.start_worker())
    running = [world.publish(num_inference_steps=150, seed=number) for number in range(3)]
    for generation_id in running:
        world.wait_for_step(generation_id)

    late = world.publish(num_inference_steps=4)

    assert world.wait_for_end(late).kind == "complete"
    assert all(world.backend.ends(generation_id) == [] for generation_id in running)
    assert worker.metric("darkroom_lanes") == 3
    for generation_id in running:
        assert world.wait_for_end(generation_id).kind == "complete"
    assert worker.metric("darkroom_lanes") == 0


def test_a_cancelled_lane_leaves_the_others_running(world: World) -> None:
    worker = ready(world.start_worker())
    jobs = [world.publish(num_inference_steps=LONG, seed=number) for number in range(3)]
    for generation_id in jobs:
        world.wait_for_step(generation_id)

    order = json.dumps({"generation_id": jobs[1]}).encode()
    connection = pika.BlockingConnection(pika.URLParameters(world.rabbitmq.url))
    connection.channel().basic_publish(f"{world.queue}.cancel", "", order)
    connection.close()

    end = world.wait_for_end(jobs[1])
    assert end.body["error_code"] == "CANCELLED"
    eventually(lambda: worker.metric("darkroom_lanes") == 2, 5)
    assert [world.backend.ends(generation_id) for generation_id in (jobs[0], jobs[2])] == [[], []]
    for generation_id in (jobs[0], jobs[2]):
        assert world.wait_for_end(generation_id).kind == "complete"
    world.wait_until_clean()
    assert len(world.backend.ends(jobs[1])) == 1
    assert worker.metric("darkroom_denoise_lane_steps_total") < 3 * LONG


def test_a_poison_job_fails_alone_and_nine_innocents_in_its_batch_complete(world: World) -> None:
    # Given ten jobs in the queue, one of which kills the engine at its third step
    innocents = [world.publish(num_inference_steps=12, seed=number) for number in range(5)]
    poison = world.publish(prompt="poison", num_inference_steps=12)
    innocents += [world.publish(num_inference_steps=12, seed=number) for number in range(5, 9)]

    worker = ready(world.start_worker(PYTHONPATH=str(POISON)))

    # Then it fails, they complete, and the engine died once in company and twice over the culprit alone
    end = world.wait_for_end(poison, 120)
    assert (end.kind, end.body["error_code"]) == ("failed", "ENGINE_CRASHED")
    for generation_id in innocents:
        assert world.wait_for_end(generation_id, 120).kind == "complete"
    assert worker.metric("darkroom_engine_restarts_total") == 3
    world.wait_until_clean(dead=1)
    for generation_id in (*innocents, poison):
        assert len(world.backend.ends(generation_id)) == 1
