"""Two models on one worker whose device holds one of them: mixed jobs, and an engine that is killed in a switch."""

import itertools
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.model import DEFAULT_MODEL
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from inference.checkpoints.memory_plan import RESERVE_BYTES
from tests.faults.station import SITE
from tests.support.images.parity import DIFFERENT_DB, psnr
from tests.support.long import IS_LONG
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_z_image, load_pipe, write_adapter
from tests.support.paths import ROOT
from tests.support.world import Worker, World, eventually, new_world

NUM_JOBS = 60 if IS_LONG else 24
# Of those that jobs drawn in their order would take. Few jobs have hardly an order.
MOST_SWITCHES = 0.25 if IS_LONG else 0.5
FOLDERS = {DEFAULT_MODEL: "sd", "z": "z"}
# At the base size of the tiny checkpoints.
FIELDS = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path) as made:
        yield made


def start_worker(world: World) -> Worker:
    """Start a worker with two tiny models; a switch waits for the file `go`."""
    folder = world.folder
    default, other = build_tiny_sd(folder / "sd"), build_tiny_z_image(folder / "z")
    for name, checkpoint in ((DEFAULT_MODEL, default), ("z", other)):
        adapter = write_adapter(folder / f"{name}.safetensors", load_pipe(checkpoint), layout="diffusers_new")
        world.upload(f"models/{name}.safetensors", adapter.read_bytes())
    # The weights of both, and nothing for the adapters of two.
    room = RESERVE_BYTES + sum(file.stat().st_size for file in folder.glob("*/*/*.safetensors"))
    return world.start_worker(
        MODEL_ID=str(default),
        MODELS=f"z={other}",
        ADAPTER_SLOTS="4",
        ADAPTER_MAX_RANK="8",
        PYTHONPATH=f"{SITE}{os.pathsep}{ROOT}",
        FAULTS_FOLDER=str(folder),
        FAULTS_ROOM=str(room),
        FAULTS_HOLD="inference.checkpoints.offload:HostedWeights.enter",
    )


def publish_mixed(world: World, models: list[str], *, first_seed: int = 0) -> dict[int, str]:
    """Publish a job for each of these models, with an adapter of it. Returns the models by generation id."""
    return {
        world.publish(model=model, lora_path=f"models/{model}.safetensors", seed=seed, **FIELDS): model
        for seed, model in enumerate(models, start=first_seed)
    }


def check_ends(world: World, jobs: dict[int, str]) -> None:
    """Check that every job completes once, drawn by the model that it names."""
    ends = {generation_id: world.wait_for_end(generation_id) for generation_id in jobs}
    assert {end.kind for end in ends.values()} == {"complete"}
    for generation_id, model in jobs.items():
        assert ends[generation_id].body["metadata"]["model"] == FOLDERS[model]
        assert len(world.backend.ends(generation_id)) == 1
    world.wait_until_clean()


def test_mixed_jobs_end_once_each_with_few_switches_and_though_the_engine_is_killed_in_one(world: World) -> None:
    reached, go = world.folder / "reached", world.folder / "go"
    go.touch()
    worker = start_worker(world)
    worker.wait_until_ready()

    # Mixed jobs, more of them than the worker holds at once
    order = random.Random(7)
    models = [order.choice((DEFAULT_MODEL, "z")) for _ in range(NUM_JOBS)]
    check_ends(world, publish_mixed(world, models))
    in_their_order = sum(one != other for one, other in itertools.pairwise(models))
    assert 0 < worker.metric("darkroom_model_switches_total") <= in_their_order * MOST_SWITCHES

    # An engine that is killed while a model comes in another's place
    go.unlink()
    reached.unlink()
    jobs = publish_mixed(world, [DEFAULT_MODEL, "z", DEFAULT_MODEL, "z"], first_seed=NUM_JOBS)
    eventually(reached.exists, worker.log_tail)
    eventually(lambda: worker.metric("darkroom_idle_seconds_total", reason="switching_model") > 0, worker.log_tail)
    os.kill(worker.engine_pid(), signal.SIGKILL)
    go.touch()
    check_ends(world, jobs)
    assert worker.metric("darkroom_engine_restarts_total") == 1

    # One job of each, without adapters, and one for a model that is not there
    pair = [world.publish(model=model, seed=1, **FIELDS) for model in FOLDERS]
    assert all(world.wait_for_end(one).kind == "complete" for one in pair)
    assert psnr(*(world.image(one) for one in pair)) < DIFFERENT_DB
    end = world.wait_for_end(world.publish(model="photo"))
    assert (end.kind, end.body["error_code"]) == ("failed", "UNKNOWN_MODEL")
    assert end.body["error_message"].endswith("this worker has default, z")
