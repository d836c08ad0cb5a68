"""Real servers for every test that asks: one broker and one object store a session, one backend and bucket a test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from config.settings import SECTIONS, StoreSettings

if TYPE_CHECKING:
    # Each fixture imports its server: the engine's tests run where neither these nor their clients are installed.
    from examples.parts.backend import Backend
    from examples.parts.rabbitmq import RabbitMQ
    from examples.parts.seaweedfs import SeaweedFS

# The machine's choice of GPU, which the engine's own tests must respect.
KEPT_VARIABLES = {"CUDA_VISIBLE_DEVICES"}


# The longest files first, so that the test processes end at about the same time.
SLOW_FILES = (
    "test_live_status",
    "test_commands",
    "test_gpu_command",
    "test_live_faults",
    "test_live_batching",
    "test_families",
    "test_live_jobs",
    "test_campaigns",
    "test_live_leaks",
    "test_demo_model",
    "test_live_families",
    "test_live_kinds",
    "test_engine_process",
    "test_live_effect",
    "test_field",
    "test_live_returns",
    "test_live_inputs",
    "test_live_product",
    "test_live_faults_product",
    "test_kinds",
    "test_control",
    "test_batching",
    "test_batching_faults",
    "test_live_outage",
    "test_safety",
    "test_overlay",
    "test_status",
    "test_live_hostile",
    "test_examples",
    "test_live_faults_process",
    "test_dead_letters",
    "test_live_faults_backend",
    "test_checks",
    "test_live_faults_broker",
    "test_live_faults_store",
    "test_prometheus",
    "test_live_sharing",
    "test_live_cancelling",
    "test_live_breakers",
    "test_checkpoints",
)


def has_gpu_tests(path: Path) -> bool:
    """True of a file with tests that are marked `gpu`."""
    return re.search(r"mark\.gpu\b|on_gpu\(", path.read_text()) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Under `-m gpu` read no file without such a test: it may need what a GPU machine does not have installed."""
    if config.getoption("markexpr") == "gpu" and collection_path.match("test_*.py"):
        return not has_gpu_tests(collection_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; within a file the order stays as written."""
    rank = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """Keep a developer's `.env` and environment out of every section built in this process or below it."""
    with pytest.MonkeyPatch.context() as patch:
        for section in SECTIONS.values():
            patch.setitem(section.model_config, "env_file", None)
            for field in section.model_fields.values():
                if field.validation_alias not in KEPT_VARIABLES:
                    patch.delenv(str(field.validation_alias), raising=False)
        yield


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[RabbitMQ]":
    """A running private broker. A test that stops or breaks it leaves it running and without policies or alarms."""
    from examples.parts.rabbitmq import RabbitMQ

    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SeaweedFS]":
    """A running private object store. A test that stops it starts it again."""
    from examples.parts.seaweedfs import SeaweedFS

    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture
def bucket(s3_server: "SeaweedFS") -> str:
    """The name of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(name)
    return name


@pytest.fixture
def store_settings(s3_server: "SeaweedFS", bucket: str, tmp_path: Path) -> StoreSettings:
    """Settings of the running store and the test's own bucket and cache."""
    return StoreSettings(**s3_server.env(bucket), CACHE_DIR=tmp_path / "cache")  # type: ignore[call-arg, arg-type]


@pytest.fixture
def backend() -> "Iterator[Backend]":
    """A running backend with an empty journal."""
    from examples.parts.backend import Backend

    with Backend() as running:
        yield running


@pytest.fixture
def queue_name() -> str:
    """A queue name no other test uses. Nothing is declared."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The test process computes on one thread, and on a GPU with all digits."""
    from tests.pictures import one_torch_thread, whole_fp32  # bring torch, which most tests do without

    with one_torch_thread(), whole_fp32():
        yield


@pytest.fixture
def no_forward_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The engine tries the lanes of a forward that failed in smaller ones, and so hides what was wrong with it."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelname == "ERROR"] == []
