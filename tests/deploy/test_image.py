"""The Dockerfile: clean to its linter, and true to the code it packs. What its steps make is tried elsewhere."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from config.service import ServiceSettings
from config.settings import SECTIONS
from tests.support.paths import ROOT
from tests.support.status_pages import status
from worker.monitoring.http_server import HealthServer

TEXT = (ROOT / "Dockerfile").read_text()
# Each instruction on a line of its own, without comments.
INSTRUCTIONS = [
    line.strip()
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line.strip()
]
WORKER_PACKAGES = {"worker", "inference", "watermark", "clients", "config"}
SETTINGS = {str(field.validation_alias) for section in SECTIONS.values() for field in section.model_fields.values()}
OTHERS_VARIABLES = {
    *("LANG", "PATH", "HF_HOME", "HF_HUB_OFFLINE", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
    *("PYTHONUNBUFFERED", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK"),
    *("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
}


def arguments(instruction: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in INSTRUCTIONS if line.startswith(f"{instruction} ")]


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments("ENV"))))


def health_command() -> list[str]:
    [check] = arguments("HEALTHCHECK")
    return json.loads(check[check.index("CMD ") + 4 :])  # type: ignore[no-any-return]


def test_linter_finds_nothing_in_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")

    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_last_target_is_cuda_and_cpu_and_demo_are_others() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", TEXT, re.MULTILINE)

    assert stages[-1] == ("runtime", "cuda")
    assert {("runtime", "cpu"), ("cpu", "demo")} < set(stages)
    assert {base for base, _ in stages} <= {name for _, name in stages} | {"debian:trixie-slim"}


def test_image_runs_the_worker_unprivileged_and_stops_it_by_sigterm() -> None:
    assert [json.loads(text) for text in arguments("ENTRYPOINT") + arguments("CMD")] == [["darkroom"], ["run"]]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    # As root for the compiler of the CUDA target alone.
    assert arguments("USER") == ["10001:10001", "0:0", "10001:10001"]
    assert "--uid 10001" in TEXT
    assert "--gid 10001" in TEXT


def test_cuda_image_alone_has_what_builds_kernels_and_keeps_them_on_the_volume() -> None:
    before, cuda = TEXT.split("FROM runtime AS cuda\n")

    assert all(package in cuda for package in ("gcc", "g++", "libc6-dev", "python3-dev"))
    assert "python3-dev" not in before
    assert re.findall(r"(\w+_CACHE_DIR)=(\S+)", cuda) == [
        ("TRITON_CACHE_DIR", "/cache/triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "/cache/inductor"),
    ]


def test_image_holds_the_worker_s_packages_and_the_demo_s_the_examples_besides() -> None:
    copied = [text.split() for text in arguments("COPY") if not text.startswith("--from")]
    sources = {source for *found, _ in copied for source in found}
    [demo] = re.findall(r"^FROM cpu AS demo$(.+?)^FROM ", TEXT, re.MULTILINE | re.DOTALL)

    assert sources - WORKER_PACKAGES == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "examples"}
    assert sources > WORKER_PACKAGES
    assert re.findall(r"^COPY (\S+) ", TEXT, re.MULTILINE).count("examples") == 1
    assert "COPY examples " in demo
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in ignored if line and line[0] not in "#!") == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_every_package_that_the_worker_needs_is_one_that_is_copied() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]

    assert {pattern.rstrip("*") for pattern in found} - WORKER_PACKAGES == {"examples"}


def test_image_dependencies_are_those_of_the_worker_its_engine_cutouts_and_tracing() -> None:
    [command] = [text for text in arguments("RUN") if "tomllib" in text]

    made = subprocess.run(
        ["/bin/sh", "-c", command.replace("> requirements.txt", "")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["engine"], *extras["cutout"], *extras["tracing"]]
    assert made.stdout.splitlines() == wanted
    assert f"ARG VERSION={project['version']}\n" in TEXT


def test_demo_s_model_is_among_the_examples() -> None:
    assert Path(environment()["MODEL_ID"].replace("/opt/darkroom", str(ROOT))).is_dir()


def test_image_variables_are_settings_or_of_known_programs() -> None:
    assert set(environment()) <= SETTINGS | OTHERS_VARIABLES


def test_image_names_no_server_but_itself_and_torch_s_index() -> None:
    assert set(re.findall(r"https?://([^:/'\"]+)", TEXT)) == {"127.0.0.1", "download.pytorch.org"}


def test_the_exposed_port_is_the_one_the_worker_takes() -> None:
    port = str(ServiceSettings.model_fields["metrics_port"].default)

    assert (arguments("EXPOSE"), environment()["METRICS_PORT"]) == ([port], port)


@pytest.mark.parametrize("is_there", [True, False])
def test_health_check_passes_for_a_worker_that_answers_alone(is_there: bool) -> None:
    server = HealthServer(0, CollectorRegistry(), lambda: "the engine is loading the model", status, lambda _: None)
    port = server.port
    server.start()
    if not is_there:
        server.close()
    _, *script = health_command()

    done = subprocess.run(
        [sys.executable, *script], env={"METRICS_PORT": str(port)}, capture_output=True, timeout=120, check=False
    )

    assert (done.returncode == 0) is is_there
    if is_there:
        server.close()
