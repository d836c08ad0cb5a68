"""The worker behind the backend that it was made for: its messages, its trainer's folders, its answers, its faults.

The short form has an engine without torch and folders like the trainer's: that such folders are read and change the
picture is in the engine's own tests. `make field` trains the styles and draws them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy
import pytest

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import stand_in_env
from tests.hostile.inputs import peft_config, peft_weights
from tests.support.long import IS_LONG, long
from tests.support.paths import DEMO_MODEL, SIGNATURE
from tests.support.servers.style_backend import StyleBackend, train_style
from tests.support.world import HANG_SECONDS, Worker, World, eventually, new_world
from worker.results.address_breaker import REFUSALS_TO_OPEN

NUM_STYLES = int(os.environ.get("FIELD_STYLES", "3"))
SIGNATURE_KEY = "signatures/서울 아틀리에 #1.png"
MISSING_STYLE, UNSIGNED_STYLE = 999, 1000
TAGS = ("수채화", "red fox", "밤 하늘")


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def backend(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StyleBackend]:
    """Run the backend with its styles uploaded, and one whose weights were deleted since."""
    world.upload(SIGNATURE_KEY, SIGNATURE.read_bytes())
    signature_url = f"{world.store.endpoint_url}/{world.bucket}/{quote(SIGNATURE_KEY)}"
    with StyleBackend(world, tmp_path_factory.mktemp("backend")) as running:
        leave = leave_trained_styles if IS_LONG else leave_styles
        for style_id, model_path in enumerate(leave(world, tmp_path_factory), start=1):
            running.add_style(style_id, model_path=model_path, signature_url=signature_url)
        gone = f"gs://{world.bucket}/models/style-{MISSING_STYLE}/adapter_model.safetensors"
        running.add_style(MISSING_STYLE, model_path=gone, signature_url=signature_url)
        first = f"gs://{world.bucket}/models/style-1/adapter_model.safetensors"
        running.add_style(UNSIGNED_STYLE, model_path=first, signature_url="")
        yield running


def leave_trained_styles(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Train the styles as the trainer does; return where they are."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(DEMO_MODEL / "checkpoint" / "unet")
    return [
        train_style(world, unet, style_id, tmp_path_factory.mktemp("style")) for style_id in range(1, NUM_STYLES + 1)
    ]


def leave_styles(world: World, _: pytest.TempPathFactory) -> list[str]:
    """Leave folders with the names of the trainer's."""
    for style_id in range(1, NUM_STYLES + 1):
        world.upload(f"models/style-{style_id}/adapter_config.json", peft_config())
        world.upload(f"models/style-{style_id}/adapter_model.safetensors", peft_weights())
    return [
        f"gs://{world.bucket}/models/style-{style_id}/adapter_model.safetensors"
        for style_id in range(1, NUM_STYLES + 1)
    ]


@pytest.fixture(scope="module")
def worker(world: World, backend: StyleBackend) -> Worker:
    stand_in = {} if IS_LONG else stand_in_env(world.folder / "journal", {})
    started = world.start_worker(**backend.env() | stand_in, INFERENCE_STEPS="4")
    started.wait_until_ready()
    return started


def wait_for_status(backend: StyleBackend, status: str, *generation_ids: int, worker: Worker) -> None:
    eventually(
        lambda: all(backend.generation(one)["status"] == status for one in generation_ids),
        lambda: f"{[backend.generation(one) for one in generation_ids]}\n{worker.log_tail()}\n{backend.log()[-2000:]}",
    )


def pixels(world: World, generation_id: int) -> numpy.ndarray:
    return numpy.asarray(world.image(generation_id).convert("RGB"), dtype=float)


def test_each_style_that_the_trainer_left_is_drawn_and_told(
    world: World, backend: StyleBackend, worker: Worker
) -> None:
    ordered = [backend.order(style_id, *TAGS) for style_id in range(1, NUM_STYLES + 1)]

    wait_for_status(backend, "completed", *ordered, worker=worker)

    for generation_id in ordered:
        row = backend.generation(generation_id)
        assert row["result_url"].endswith(f"/generations/gen-{generation_id}.png")
        assert row["progress"]["prompt_tags"] == list(TAGS)
    world.wait_until_clean()


@long
def test_each_style_changes_the_picture_in_its_own_way(world: World, backend: StyleBackend, worker: Worker) -> None:
    ordered = [backend.order(style_id, *TAGS, seed=7) for style_id in range(1, NUM_STYLES + 1)]

    wait_for_status(backend, "completed", *ordered, worker=worker)

    images = [pixels(world, generation_id) for generation_id in ordered]
    for number, image in enumerate(images[1:]):
        assert abs(image - images[number]).mean() > 1.0


def test_each_ratio_that_the_backend_sells_is_drawn(world: World, backend: StyleBackend, worker: Worker) -> None:
    ordered = {ratio: backend.order(1, *TAGS, aspect_ratio=ratio) for ratio in ("1:1", "1:2", "2:2")}

    wait_for_status(backend, "completed", *ordered.values(), worker=worker)

    sizes = {ratio: world.image(generation_id).size for ratio, generation_id in ordered.items()}
    width, height = sizes["1:1"]
    assert sizes == {"1:1": (width, height), "1:2": (width, height * 2), "2:2": (width * 2, height * 2)}


def test_backend_that_crashes_on_failures_refunds_each_once_after_its_repair(
    world: World, backend: StyleBackend, worker: Worker
) -> None:
    failing = [backend.order(MISSING_STYLE, *TAGS) for _ in range(3)]
    eventually(
        lambda: len({event["generation_id"] for event in worker.events("webhook parked")} & set(failing)) == 3,
        worker.log_tail,
    )
    good = backend.order(2, *TAGS)
    wait_for_status(backend, "completed", good, worker=worker)
    assert backend.refunds() == []

    backend.restart(is_repaired=True)

    wait_for_status(backend, "failed", *failing, worker=worker)
    world.wait_until_clean()
    assert sorted(backend.refunds()) == [(generation_id, 50) for generation_id in failing]
    assert {backend.generation(one)["error_code"] for one in failing} == {"LORA_NOT_FOUND"}


def test_backend_that_rejects_its_own_host_gets_every_end_once_it_accepts(
    world: World, backend: StyleBackend, worker: Worker, tmp_path: Path
) -> None:
    # A worker that finds all of them in the queue: no end is told before the backend rejects it
    worker.process.send_signal(signal.SIGSTOP)
    ordered = [backend.order(number % NUM_STYLES + 1, *TAGS) for number in range(REFUSALS_TO_OPEN + 2)]
    backend.restart(allowed_hosts="api.example.com", is_repaired=True)
    worker.process.send_signal(signal.SIGCONT)
    eventually(lambda: worker.get("/health/ready")[0] == 503, worker.log_tail)
    assert "ALLOWED_HOSTS" in worker.get("/health/ready")[1]

    # The ends that were refused before that was plain are dead letters, which a person replays
    backend.restart(is_repaired=True)
    eventually(lambda: worker.get("/health/ready")[0] == 200, worker.log_tail)
    env = world.env() | backend.env()
    command = [str(Path(sys.executable).parent / "darkroom"), "dead", "replay", "--all"]
    subprocess.run(command, env=env, cwd=tmp_path, check=True, timeout=HANG_SECONDS)

    wait_for_status(backend, "completed", *ordered, worker=worker)
    world.wait_until_clean()


def test_the_signature_at_a_percent_encoded_address_is_on_the_image(
    world: World, backend: StyleBackend, worker: Worker
) -> None:
    signed, unsigned = (backend.order(style_id, *TAGS, seed=7) for style_id in (1, UNSIGNED_STYLE))

    wait_for_status(backend, "completed", signed, unsigned, worker=worker)

    changed = abs(pixels(world, signed) - pixels(world, unsigned)).max(axis=2) > 8
    height, width = changed.shape
    assert changed[height // 2 :, width // 2 :].any()
    assert not changed[: height // 2, : width // 2].any()
