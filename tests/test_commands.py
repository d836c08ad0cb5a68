"""The commands beside `run`, as a person types them, on real parts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.world import DEMO_MODEL, World, eventually, new_world
from worker.cli import app

DARKROOM = str(Path(sys.executable).parent / "darkroom")
ADAPTER = DEMO_MODEL / "adapters" / "neon.safetensors"


def darkroom(*arguments: object, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; both streams in `stdout`."""
    return subprocess.run(
        [DARKROOM, *map(str, arguments)],
        env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        yield made


def test_generate_draws_signs_and_writes_pictures(tmp_path: Path) -> None:
    env = {"MODEL_ID": str(DEMO_MODEL / "checkpoint"), "EMBED_METADATA": "full"}
    options = ["--lora", ADAPTER, "--artist", "서울", "--steps", 8, "--guidance", 3, "-n", 2]

    done = darkroom("generate", "neon: a castle", "-o", tmp_path / "castle.png", *options, env=env, folder=tmp_path)

    assert done.returncode == 0, done.stdout
    assert [Image.open(tmp_path / name).size for name in ("castle.png", "castle-2.png")] == [(128, 128)] * 2
    assert "seed 1" in done.stdout
    told = Image.open(tmp_path / "castle-2.png").info
    assert told["parameters"].startswith("neon: a castle\nSteps: 8, ")
    assert (json.loads(told["Darkroom"])["seed"], json.loads(told["Darkroom"])["adapters"]) == (1, [Path(ADAPTER).stem])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--aspect", "9:1"], "aspect_ratio"),
        (["--scheduler", "magic"], "dpm++"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--lora", "none.safetensors"], "none.safetensors"),
    ],
)
def test_generate_says_what_is_wrong_in_a_sentence_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], word: str
) -> None:
    # In this process: each new one would spend five seconds on imports.
    monkeypatch.setenv("MODEL_ID", str(DEMO_MODEL / "checkpoint"))

    done = CliRunner().invoke(app, ["generate", "a fox", "-o", str(tmp_path / "a.png"), "--steps", "2", *options])

    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert word in done.output
    assert not (tmp_path / "a.png").exists()


def test_submit_publishes_a_job_and_follows_it_to_its_end_and_report_draws_it(world: World, tmp_path: Path) -> None:
    start_light_worker(world)
    world.upload_demo_adapter("sepia")
    options = ["--generation-id", 77, "--steps", 8, "--guidance", 3]

    good = darkroom(
        "submit", "sepia: an owl", *options, "--lora", "models/sepia.safetensors", env=world.env(), folder=tmp_path
    )
    bad = darkroom("submit", "an owl", *options, "--lora", "models/no.safetensors", env=world.env(), folder=tmp_path)
    refused = darkroom("submit", "an owl", *options, "--lora", "/etc/passwd", env=world.env(), folder=tmp_path)
    drawn = darkroom("report", env=world.env(), folder=tmp_path)
    told = darkroom("report", "--json", env=world.env(), folder=tmp_path)

    assert good.returncode == 0, good.stdout
    assert good.stdout.splitlines()[-1].endswith("generations/gen-77.png")
    assert "denoise" in good.stdout
    assert (bad.returncode, "LORA_NOT_FOUND" in bad.stdout) == (1, True)
    assert (refused.returncode, "/etc/passwd" in refused.stdout, "published" in refused.stdout) == (1, True, False)

    assert drawn.returncode == 0, drawn.stdout
    assert "2 jobs: 1 complete, 1 failed" in drawn.stdout
    assert "an owl" not in drawn.stdout + told.stdout
    complete, failed = map(json.loads, told.stdout.splitlines())
    names = [name for name, _, _ in complete["stages"]]
    assert names[:9] == ["ledger", "fetch", "wait", "adapt", "encode", "denoise", "decode", "sign", "store"]
    assert complete["seconds"] >= max(start + seconds for _, start, seconds in complete["stages"]) - 0.01
    assert (failed["error_code"], failed["attempt"], failed["worker"]) == ("LORA_NOT_FOUND", 1, complete["worker"])
    assert {"ledger", "fetch"} <= {name for name, _, _ in failed["stages"]}


def test_submit_says_that_nobody_takes_the_job_and_that_it_goes_on(world: World, tmp_path: Path) -> None:
    env = world.env() | {"RABBITMQ_QUEUE": "nobody-listens"}

    done = darkroom("submit", "an owl", "--generation-id", 78, "--timeout", 1, env=env, folder=tmp_path)

    assert done.returncode == 1
    assert "no worker takes jobs from nobody-listens" in done.stdout
    assert "The job goes on" in done.stdout
    assert "nobody-listens.cancel" in done.stdout
    assert world.rabbitmq.queues()["nobody-listens"].ready == 1


def test_a_submit_that_is_interrupted_leaves_the_job_and_says_how_to_cancel_it(world: World, tmp_path: Path) -> None:
    env = world.env() | {"RABBITMQ_QUEUE": "nobody-listens-here", "COLUMNS": "200"}
    command = [DARKROOM, "submit", "an owl", "--generation-id", "79"]
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    published = process.stderr.readline()

    time.sleep(1)  # it is being followed by now, or about to be
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)

    task_id = published.split()[-1]
    assert process.returncode == 1, said
    assert "No longer followed. The job goes on" in said
    assert f'{{"task_id": "{task_id}"}}' in said
    assert "Traceback" not in said
    assert world.rabbitmq.queues()["nobody-listens-here"].ready == 1


def test_check_finds_every_part_good_and_names_those_that_are_not(world: World, tmp_path: Path) -> None:
    env = world.env() | {"CACHE_MAX_GB": "0.1"}
    wrong = {
        "RABBITMQ_PASS": "wrong",
        "AWS_STORAGE_BUCKET_NAME": "nobody",
        "MODEL_ID": str(tmp_path),
        "INTERNAL_API_TOKEN": "x",
    }

    good = darkroom("check", "--json", env=env, folder=tmp_path)
    bad = darkroom("check", env=env | wrong, folder=tmp_path)

    assert good.returncode == 0, good.stdout
    assert [row["state"] for row in map(json.loads, good.stdout.splitlines())] == ["good"] * 16
    counts = [bad.stdout.count(f" {state} ") for state in ("bad", "blocked", "good")]
    assert (bad.returncode, counts) == (1, [4, 4, 8]), bad.stdout
    assert all(word in bad.stdout for word in ("RABBITMQ_PASS", "nobody", "model_index.json", "INTERNAL_API_TOKEN"))


def test_run_says_so_where_its_port_is_taken(world: World, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        done = darkroom("run", env=world.env() | {"METRICS_PORT": str(taken.getsockname()[1])}, folder=tmp_path)

    assert done.returncode == 2
    assert "METRICS_PORT" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_store_that_hangs_does_not_hold_the_worker_beyond_its_grace(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        worker = start_light_worker(world, SHUTDOWN_GRACE_SECONDS="7")
        os.kill(s3_server.pid, signal.SIGSTOP)
        try:
            world.publish()
            eventually(lambda: len(worker.events("job in")) == 1, 10)
            started_at = time.monotonic()
            exit_code = worker.terminate()
            seconds = time.monotonic() - started_at
        finally:
            os.kill(s3_server.pid, signal.SIGCONT)

        assert exit_code == 0
        assert seconds < 8
        eventually(lambda: sum(world.queues()[""]) == 1, 5, lambda: str(world.queues()))


def test_the_demo_runs_to_its_end_and_draws_what_it_promises(tmp_path: Path) -> None:
    done = darkroom("demo", "--out", tmp_path / "out", env={"PATH": os.environ["PATH"]}, folder=tmp_path)

    assert done.returncode == 0, done.stdout
    assert "16 of 16 jobs complete" in done.stdout
    for name in ("contact-sheet.png", "timeline.png"):
        assert Image.open(tmp_path / "out" / name).width > 800
