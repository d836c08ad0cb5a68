"""The wheel, unpacked beside nothing but the base dependencies: what is in it, and what works without the engine."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.long import long
from tests.support.paths import ROOT
from tests.support.world import World, new_world, shadow_modules
from worker.version import DISTRIBUTION, darkroom_version

MAX_WHEEL_BYTES = 20_000_000
PACKAGES = {"worker", "inference", "watermark", "clients", "config", "examples"}
ENGINE = ("torch", "diffusers", "transformers", "accelerate", "compel", "safetensors", "peft", "cv2", "c2pa")
EACH_IN_TURN = """
import json, sys
from worker.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv[:] = ["darkroom", *words]
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code or 0, flush=True)
"""
# What a worker needs of its machine, and who only submits does not.
MACHINE = {"port", "fonts", "shaping", "certificate", "cut-outs", "disk", "GPU", "memory", "model"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel in a copy of the source: setuptools leaves folders of its own where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    source += [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    for path in source:
        if "__pycache__" not in path.parts:
            copy = folder / "tree" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)  # no link: Debian 13 has /tmp on a file system of its own
    # What pip asks of setuptools, without pip: it takes as long as the build.
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=folder / "tree", check=True, timeout=300, stdout=subprocess.DEVNULL
    )
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into a folder of packages that holds beside it what the wheel depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for found in base_distributions().values():
        for file in found.files or ():
            place = folder / file.parts[0]
            if ".." not in file.parts and file.parts[0] != "__pycache__" and not place.exists():
                place.symlink_to(str(found.locate_file(file.parts[0])))
    return folder


def base_distributions() -> dict[str, Distribution]:
    """Map every distribution that a plain `pip install darkroom-worker` brings, by its name."""
    found: dict[str, Distribution] = {}
    waiting = list(requires(DISTRIBUTION) or ())
    while waiting:
        requirement = Requirement(waiting.pop())
        is_base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_base and requirement.name not in found:
            found[requirement.name] = distribution(requirement.name)
            waiting += found[requirement.name].requires or ()
    return found


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("folder-of-a-user")
    shadow_modules(folder)
    with new_world(rabbitmq, s3_server, folder) as made:
        yield made


def typed(site: Path, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command as its script does, with `site` as all that is installed; both streams in `stdout`."""
    code = "import sys; sys.argv[0] = 'darkroom'; from worker.cli.main import main; main()"
    return python(site, folder, code, *arguments, **env)


def python(site: Path, folder: Path, code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with `site` as all that is installed; both streams in `stdout`."""
    # -P: a script's path begins with the script's folder, not with the working directory. -S: no other packages.
    return subprocess.run(
        [sys.executable, "-P", "-S", "-c", code, *arguments],
        env={"PATH": os.environ["PATH"], "COLUMNS": "200"} | env | {"PYTHONPATH": str(site)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def test_wheel_holds_the_worker_and_the_demo_with_its_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    assert wheel.name.startswith(f"darkroom_worker-{darkroom_version()}-")
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES
    model = [path.relative_to(ROOT) for path in (ROOT / "examples/demo_model/checkpoint").rglob("*") if path.is_file()]
    assert {str(path) for path in model} <= set(names)
    assert {"examples/demo_model/LICENSE", "examples/demo_model/adapters/neon.safetensors"} <= set(names)
    assert "config/presets/presets.yaml" in names


def test_base_brings_nothing_of_the_engine(site: Path) -> None:
    assert [name for name in ENGINE if (site / name).exists()] == []


def test_light_commands_work_without_the_engine(site: Path, world: World) -> None:
    env = world.env()

    version = typed(site, world.folder, "--version", **env)
    submitted = typed(site, world.folder, "submit", "a fox", "--generation-id", "7", "--timeout", "0.1", **env)
    # In one process, which loads pika, boto3 and the settings once.
    others = [["cancel", "7"], ["dead", "list"], ["outbox", "list"], ["report"]]
    ended = python(site, world.folder, EACH_IN_TURN, json.dumps(others), **env)

    assert version.stdout == f"darkroom {darkroom_version()}\n"
    assert "no worker takes jobs" in submitted.stdout, submitted.stdout
    assert world.queues()[""] == (1, 0)
    assert "no worker" in ended.stdout.partition("ended with")[0]
    assert re.findall(r"ended with (\d+)", ended.stdout)[1:] == ["0"] * 3, ended.stdout


def test_check_without_the_engine_tries_the_services_and_says_what_it_did_not_try(site: Path, world: World) -> None:
    done = typed(site, world.folder, "check", "--json", **world.env())

    rows = {row["part"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stdout
    assert {part for part, row in rows.items() if row["state"] == "not tried"} == MACHINE
    assert {row["state"] for part, row in rows.items() if part not in MACHINE} == {"good"}
    assert "the engine is not installed here (torch, " in rows["model"]["detail"]
    assert "install the extra `engine`, in a checkout by pip install '.[engine]'" in rows["model"]["detail"]


@pytest.mark.parametrize("words", [["run"], pytest.param(["generate", "a fox", "-o", "fox.png"], marks=long)])
def test_a_command_that_draws_says_in_one_sentence_that_the_engine_is_missing(
    site: Path, tmp_path: Path, words: list[str]
) -> None:
    done = typed(site, tmp_path, *words)

    assert done.returncode == 2
    assert done.stdout.startswith("Not started: the engine is not installed here (torch, ")
    assert done.stdout.endswith("): install the extra `engine`, in a checkout by pip install '.[engine]'\n")
    assert done.stdout.count("\n") == 1


def test_the_demo_says_what_it_is_missing_before_it_starts_anything(site: Path, tmp_path: Path) -> None:
    done = typed(site, tmp_path, "demo", PATH="", RABBITMQ_ROOT=str(tmp_path))

    packages, broker = done.stdout.splitlines()
    assert done.returncode == 2
    assert packages.startswith("Not started: Python packages are missing (torch, ")
    assert packages.endswith("matplotlib): install the extra `demo`, in a checkout by pip install '.[demo]'")
    assert "apt-get install rabbitmq-server" in broker
    assert list(tmp_path.iterdir()) == []
