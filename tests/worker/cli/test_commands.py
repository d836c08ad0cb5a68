"""The commands beside `run`, as a person types them, on real parts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from examples.parts.ports import free_port
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import stand_in_env, start_light_worker
from tests.support.long import IS_LONG, long
from tests.support.paths import DEMO_MODEL
from tests.support.world import Worker, World, eventually, new_world
from worker.cli.main import app

DARKROOM = str(Path(sys.executable).parent / "darkroom")
ADAPTER = DEMO_MODEL / "adapters" / "neon.safetensors"
# Runs a command to its end.
Run = Callable[..., subprocess.CompletedProcess[str]]
NO_WEIGHTS = "diffusion_pytorch_model.safetensors (or model.safetensors) is missing"


def darkroom(*arguments: object, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; both streams in `stdout`."""
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


def typed(*arguments: object, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process: each new one would spend seconds on imports."""
    with chdir(folder):
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", **env})
    if not isinstance(done.exception, SystemExit | None):
        raise done.exception
    return subprocess.CompletedProcess([], done.exit_code, done.output)


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture(scope="module")
def worker(world: World) -> Worker:
    """Start a worker that takes the world's jobs and orders."""
    return start_light_worker(world)


@pytest.mark.parametrize("run", [typed, pytest.param(darkroom, marks=long)])
def test_generate_draws_signs_and_writes_images(tmp_path: Path, run: Run) -> None:
    env = {"MODEL_ID": str(DEMO_MODEL / "checkpoint"), "EMBED_METADATA": "full"}
    options = ["--lora", ADAPTER, "--artist", "서울", "--steps", 4, "--guidance", 3, "-n", 2]

    done = run("generate", "neon: a castle", "-o", tmp_path / "castle.png", *options, env=env, folder=tmp_path)

    assert done.returncode == 0, done.stdout
    assert [Image.open(tmp_path / name).size for name in ("castle.png", "castle-2.png")] == [(128, 128)] * 2
    assert "seed 1" in done.stdout
    metadata = Image.open(tmp_path / "castle-2.png").info
    assert metadata["parameters"].startswith("neon: a castle\nSteps: 4, ")
    assert (json.loads(metadata["Darkroom"])["seed"], json.loads(metadata["Darkroom"])["adapters"]) == (
        1,
        [Path(ADAPTER).stem],
    )


@pytest.fixture
def hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkpoint of configs without weights, which is refused on loading, and work in a folder of its own."""
    model = tmp_path / "hollow"
    for path in (DEMO_MODEL / "checkpoint").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = model / path.relative_to(DEMO_MODEL / "checkpoint")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setenv("MODEL_ID", str(model))
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def refused(options: list[str]) -> str:
    """Return the refusal of `generate`, on one line and in this process: each new one would spend five seconds on
    imports.
    """
    done = CliRunner().invoke(app, ["generate", "a fox", "--steps", "2", *options])

    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    return " ".join(done.output.split())


def test_a_checkpoint_without_weights_is_refused_only_once_it_is_loaded(hollow: Path) -> None:
    assert NO_WEIGHTS in refused(["-o", "work/a.png"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--aspect", "9:1"], ["aspect_ratio"]),
        (["--scheduler", "magic"], ["magic", "dpm++"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--lora", "none.safetensors"], ["the adapter none.safetensors does not exist"]),
        (["--lora", "work"], ["the adapter work/adapter_config.json does not exist"]),
        (["--lora", "made/torso.safetensors"], ["made/torso.safetensors", "safetensors header"]),
        (["--lora", "made/foreign.safetensors"], ["made/foreign.safetensors", "another model"]),
        (["--lora", "made/peft"], ["made/peft", "adapter_config.json"]),
        (["--init", "none.png"], ["init_image_path: the picture none.png does not exist"]),
        (["--reference", "none.png"], ["references.0.image_path: the picture none.png does not exist"]),
        (["--lora", "made/pickle"], ["the adapter made/pickle holds only adapter_model.bin", "may be a pickle"]),
        (["--init", "made"], ["made is a folder"]),
        (["--init", "made/vast.png"], ["init_image_path: made/vast.png has 50000001 bytes, more than 50000000"]),
        (["--signature", "made/torso.safetensors"], ["torso.safetensors"]),
        (["--control", "made/white.png", "--control-model", "canny"], ["canny", "has no ControlNets"]),
        (["--product", "made/white.png"], ["product.image_path", "CUTOUT_MODEL"]),
        (["-o", "missing/a.png"], ["missing", "does not exist"]),
        (["-o", "made/white.png/a.png"], ["made/white.png", "is a file"]),
        (["-o", "work"], ["work is a folder", "work/picture.png"]),
        (["-o", "work/a"], ["work/a has no suffix", ".png", ".jpg", ".jpeg"]),
        (["-o", "work/a.webp"], [".webp", ".png", ".jpg", ".jpeg"]),
        (["-o", "work/a.png.txt"], [".txt", ".png"]),
        (["-o", "/proc/a.png"], ["/proc"]),
        (["-o", "made/b.png", "-n", "2"], ["made/b-2.png", "is no file"]),
        (["-o", f"work/{'x' * 300}.png"], ["too long"]),
    ],
)
def test_generate_reports_a_mistake_in_a_sentence_before_it_loads_a_model(
    hollow: Path, options: list[str], words: list[str]
) -> None:
    made = hollow.parent / "made"
    (made / "peft").mkdir(parents=True)
    (made / "b-2.png").mkdir()
    (made / "pickle").mkdir()
    (made / "pickle" / "adapter_config.json").write_text("{}")
    (made / "pickle" / "adapter_model.bin").write_bytes(b"")
    with (made / "vast.png").open("wb") as vast:
        vast.truncate(50_000_001)
    (made / "peft" / "adapter_model.safetensors").write_bytes(ADAPTER.read_bytes())
    (made / "torso.safetensors").write_bytes(b"\x01")
    Image.new("RGB", (64, 64), "white").save(made / "white.png")
    layer = "transformer.layers.0.attention.to_q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(2, 8), f"{layer}.lora_B.weight": torch.zeros(8, 2)}
    save_file(weights, made / "foreign.safetensors")

    said = refused(["-o", "work/a.png", *options])

    for word in words:
        assert word in said
    assert NO_WEIGHTS not in said
    assert list(hollow.iterdir()) == []


def test_generate_writes_a_jpeg_by_its_suffix_with_its_parameters(tmp_path: Path) -> None:
    env = {"MODEL_ID": str(DEMO_MODEL / "checkpoint"), "EMBED_METADATA": "full"}
    (tmp_path / "owl-2.JPG").write_bytes(b"written over")

    done = typed("generate", "an owl", "-o", "owl.JPG", "--steps", 2, "-n", 2, env=env, folder=tmp_path)

    assert done.returncode == 0, done.stdout
    for name in ("owl.JPG", "owl-2.JPG"):
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))
            packet = image.info["xmp"].decode()
        assert "trainedAlgorithmicMedia" in packet
        assert "an owl" in packet


@pytest.mark.usefixtures("worker")
def test_submit_publishes_a_job_and_follows_it_to_its_end_and_report_draws_it(world: World, tmp_path: Path) -> None:
    world.upload_demo_adapter("sepia")
    options = ["--generation-id", 77, "--steps", 8, "--guidance", 3]

    good = typed(
        "submit", "sepia: an owl", *options, "--lora", "models/sepia.safetensors", env=world.env(), folder=tmp_path
    )
    bad = typed("submit", "an owl", *options, "--lora", "models/no.safetensors", env=world.env(), folder=tmp_path)
    refused = typed("submit", "an owl", *options, "--lora", "/etc/passwd", env=world.env(), folder=tmp_path)
    drawn = typed("report", env=world.env(), folder=tmp_path)
    reported = typed("report", "--json", env=world.env(), folder=tmp_path)

    assert good.returncode == 0, good.stdout
    assert good.stdout.splitlines()[-1].endswith("generations/gen-77.png")
    assert "denoise" in good.stdout
    assert (bad.returncode, "LORA_NOT_FOUND" in bad.stdout) == (1, True)
    assert (refused.returncode, "/etc/passwd" in refused.stdout, "published" in refused.stdout) == (1, True, False)

    assert drawn.returncode == 0, drawn.stdout
    assert "2 jobs: 1 complete, 1 failed" in drawn.stdout
    assert "an owl" not in drawn.stdout + reported.stdout
    complete, failed = map(json.loads, reported.stdout.splitlines())
    names = [name for name, _, _ in complete["stages"]]
    assert names[:9] == ["ledger", "fetch", "wait", "adapt", "encode", "denoise", "decode", "sign", "store"]
    assert complete["seconds"] >= max(start + seconds for _, start, seconds in complete["stages"]) - 0.01
    assert (failed["error_code"], failed["attempt"], failed["worker"]) == ("LORA_NOT_FOUND", 1, complete["worker"])
    assert {"ledger", "fetch"} <= {name for name, _, _ in failed["stages"]}


def test_submit_reports_a_queue_without_consumers_and_leaves_the_job(world: World, tmp_path: Path) -> None:
    env = world.env() | {"RABBITMQ_QUEUE": "nobody-listens"}

    done = typed("submit", "an owl", "--generation-id", 78, "--timeout", 1, env=env, folder=tmp_path)

    assert done.returncode == 1
    assert "no worker takes jobs from nobody-listens" in done.stdout
    assert "The job goes on" in done.stdout
    assert "nobody-listens.cancel" in done.stdout
    assert world.rabbitmq.queues()["nobody-listens"].ready == 1


def test_interrupted_submit_leaves_the_job_and_shows_how_to_cancel_it(world: World, tmp_path: Path) -> None:
    env = world.env() | {"RABBITMQ_QUEUE": "nobody-listens-here", "COLUMNS": "200"}
    command = [DARKROOM, "submit", "an owl", "--generation-id", "79"]
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    published = process.stderr.readline()

    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)

    task_id = published.split()[-1]
    assert process.returncode == 1, said
    assert "No longer followed. The job goes on" in said
    assert f'{{"task_id": "{task_id}"}}' in said
    assert "Traceback" not in said
    assert world.rabbitmq.queues()["nobody-listens-here"].ready == 1


def test_check_finds_every_part_good_and_names_those_that_are_not(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL / "checkpoint", model, copy_function=os.symlink)
    without_torch = {} if IS_LONG else stand_in_env(model, {})
    env = world.env() | without_torch | {"CACHE_MAX_GB": "0.1"}
    wrong = {
        "RABBITMQ_PASS": "wrong",
        "AWS_STORAGE_BUCKET_NAME": "nobody",
        "MODEL_ID": str(tmp_path),
        "INTERNAL_API_TOKEN": "x",
    }

    good = darkroom("check", "--json", env=env, folder=tmp_path)
    bad = typed("check", env=env | wrong, folder=tmp_path)

    assert good.returncode == 0, good.stdout
    assert [row["state"] for row in map(json.loads, good.stdout.splitlines())] == ["good"] * 19
    counts = [bad.stdout.count(f" {state} ") for state in ("bad", "blocked", "good")]
    assert (bad.returncode, counts) == (1, [4, 5, 10]), bad.stdout
    assert all(word in bad.stdout for word in ("RABBITMQ_PASS", "nobody", "model_index.json", "INTERNAL_API_TOKEN"))


def test_run_reports_a_port_that_is_taken(world: World, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        done = darkroom("run", env=world.env() | {"METRICS_PORT": str(taken.getsockname()[1])}, folder=tmp_path)

    assert done.returncode == 2
    assert "METRICS_PORT" in done.stdout
    assert "Traceback" not in done.stdout


def test_run_reports_its_page_and_the_broker_s_refusal_before_it_loads_the_model(world: World, tmp_path: Path) -> None:
    own = {"METRICS_PORT": str(free_port())} | stand_in_env(tmp_path / "nowhere" / "model", {})
    env = world.env() | own | {"RABBITMQ_PASS": "wrong", "RABITMQ_HOST": "x"}

    done = darkroom("run", env=env, folder=tmp_path)

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    events = [line["event"] for line in lines]
    assert done.returncode == 3, done.stdout  # the model cannot be loaded
    assert events[0] == "status page"
    assert lines[0]["url"] == f"http://localhost:{env['METRICS_PORT']}/"
    refusal = lines[events.index("broker not usable")]["reason"]
    assert f"{env['RABBITMQ_HOST']}:{env['RABBITMQ_PORT']} refuses user guest" in refusal
    assert "look at RABBITMQ_USER and RABBITMQ_PASS" in refusal
    assert events.index("broker not usable") < events.index("loading")


def test_cancel_reaches_a_worker_and_reports_where_there_is_none(world: World, worker: Worker, tmp_path: Path) -> None:
    heard = typed("cancel", "gen_7", env=world.env(), folder=tmp_path)
    lonely = typed("cancel", "gen_7", env=world.env() | {"RABBITMQ_QUEUE": "nobody-cancels"}, folder=tmp_path)

    assert (heard.returncode, '{"generation_id": "gen_7"} was sent' in heard.stdout) == (0, True), heard.stdout
    eventually(lambda: [one["generation_id"] for one in worker.events("cancel order")] == ["gen_7"])
    assert (lonely.returncode, "no worker listens on" in lonely.stdout) == (1, True), lonely.stdout


def test_hanging_store_does_not_keep_the_worker_beyond_its_grace(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        worker = start_light_worker(world, SHUTDOWN_GRACE_SECONDS="7")
        os.kill(s3_server.pid, signal.SIGSTOP)
        try:
            world.publish()
            eventually(lambda: len(worker.events("job in")) == 1)
            started_at = time.monotonic()
            exit_code = worker.terminate()
            seconds = time.monotonic() - started_at
        finally:
            os.kill(s3_server.pid, signal.SIGCONT)

        assert exit_code == 0
        assert seconds < 20
        eventually(lambda: sum(map(sum, world.queues().values())) == 1, lambda: str(world.queues()))
