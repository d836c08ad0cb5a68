"""Real servers as fixtures: one broker and one object store a session, one backend and bucket a test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import gc
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from config.settings import SECTIONS
from config.store import StoreSettings
from tests.support.quick import is_heavy, starts_a_program, starts_a_server

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

    # Each fixture imports its server: the engine's tests run where neither these nor their clients are installed.
    from examples.parts.backend import Backend
    from examples.parts.rabbitmq import RabbitMQ
    from examples.parts.seaweedfs import SeaweedFS

# The machine's choice of GPU, which the engine's own tests must respect.
KEPT_VARIABLES = {"CUDA_VISIBLE_DEVICES"}


HERE = Path(__file__).parent

# Their files share what is costly, and so one test process: a worker with a real engine, the classes of Kubernetes.
SHARED_FOLDERS = ("tests/live/drawing/", "tests/deploy/")

# The longest files first, so that the test processes end at about the same time.
SLOW_FILES = (
    "live/drawing/test_batching",
    "live/drawing/test_jobs",
    "live/drawing/test_kinds",
    "live/drawing/test_product",
    "live/test_returns",
    "worker/cli/test_commands",
    "inference/lora/test_adapters",
    "inference/models/test_compiling",
    "examples/test_demo",
    "campaigns/test_campaigns",
    "deploy/test_package",
    "deploy/test_helm",
    "deploy/test_deploy",
    "live/test_hostile",
    "watermark/test_overlay",
    "inference/models/test_clip_prompts",
    "inference/lora/test_products",
    "inference/device/test_cuda_path",
    "live/test_field",
    "live/test_faults_backend",
    "inference/engine/test_batching_faults",
    "live/test_results",
    "inference/models/test_families",
    "inference/process/test_engine_process",
    "test_site",
    "inference/engine/test_previews",
    "examples/test_demo_recipe",
    "live/test_queues",
    "examples/test_examples",
    "inference/engine/test_controlnets",
    "inference/engine/test_batching",
    "worker/cli/test_dead_letters",
    "live/test_effect",
    "live/test_faults_process",
    "live/test_faults_store",
    "inference/lora/test_adapter_writers",
    "watermark/test_provenance",
    "worker/product/test_product",
    "clients/storage/test_client",
    "inference/lora/test_key_names",
    "worker/cli/check/test_checks",
    "worker/monitoring/test_status_page",
    "inference/models/test_parity",
    "live/test_status",
    "live/test_cancelling",
    "inference/engine/test_kinds",
    "inference/checkpoints/test_checkpoints",
    "benchmarks/test_gpu_command",
    "live/test_breakers",
    "examples/test_frameworks",
    "examples/test_demo_model",
    "live/test_exit_when_idle",
    "live/test_tracing",
    "live/test_leaks",
    "live/test_faults_broker",
    "live/test_faults",
)


def has_gpu_tests(path: Path) -> bool:
    """Return whether the file has tests that are marked `gpu`."""
    return re.search(r"mark\.gpu\b|on_gpu\(", path.read_text()) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--quick`, which `make quick` gives."""
    parser.addoption("--quick", action="store_true", help="leave out what needs a server, a model or another program")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignore, under `-m gpu`, a file without such a test: it may need what a GPU machine does not have installed.

    Under `--quick` read none that loads a model's libraries: reading it is what takes the time.
    """
    if not collection_path.match("test_*.py"):
        return None
    if config.getoption("markexpr") == "gpu":
        return not has_gpu_tests(collection_path)
    return (config.getoption("quick") and is_heavy(collection_path)) or None


def pytest_collection_finish() -> None:
    """Collect garbage again, but none of what the modules are made of."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadFileScheduling | None":
    """Share out whole files, as `--dist loadfile` does, and of some folders all files together."""
    from xdist.scheduler import LoadFileScheduling

    class LoadFolderScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = (folder for folder in SHARED_FOLDERS if nodeid.startswith(folder))
            return next(shared, super()._split_scope(nodeid))

    return LoadFolderScheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files, and under `--quick` leave out what starts servers and programs.

    Within a file the order stays as written."""
    if config.getoption("quick"):
        slow = {item for item in items if starts_a_server(item) or starts_a_program(item)}
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]
    rank = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(HERE).with_suffix("").as_posix(), len(rank)))


# Each process reads all tests, and a fifth of the time would go into looking through what stays.
gc.disable()

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
    """Run a private broker. A test that stops or breaks it leaves it running and without policies or alarms."""
    from examples.parts.rabbitmq import RabbitMQ

    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SeaweedFS]":
    """Run a private object store. A test that stops it starts it again."""
    from examples.parts.seaweedfs import SeaweedFS

    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture
def bucket(s3_server: "SeaweedFS") -> str:
    """Make a new, empty bucket and return its name."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.make_bucket(name)
    return name


@pytest.fixture
def store_settings(s3_server: "SeaweedFS", bucket: str, tmp_path: Path) -> StoreSettings:
    """Build the settings of the running store with the test's own bucket and cache."""
    return StoreSettings(**s3_server.env(bucket), CACHE_DIR=tmp_path / "cache")  # type: ignore[call-arg, arg-type]


@pytest.fixture
def backend() -> "Iterator[Backend]":
    """Run a backend with an empty journal."""
    from examples.parts.backend import Backend

    with Backend() as running:
        yield running


@pytest.fixture
def queue_name() -> str:
    """Return a queue name no other test uses. Nothing is declared."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread in the test's process, and on a GPU without TF32."""
    from tests.support.images.parity import one_torch_thread, whole_fp32  # bring torch, which most tests do without

    with one_torch_thread(), whole_fp32():
        yield


@pytest.fixture
def no_forward_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test where a forward failed: the engine retries its lanes in smaller ones, which hides the cause."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelname == "ERROR"] == []
