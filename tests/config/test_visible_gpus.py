"""DEVICE and CUDA_VISIBLE_DEVICES name one GPU, and all that looks at a GPU looks at that one."""

from pathlib import Path
from typing import Any, NamedTuple

import pynvml
import pytest

from clients.gpu import GpuMonitor
from config.model import ModelSettings
from config.section import SettingsError, load_section
from config.settings import SECTIONS, Settings
from config.visible_gpus import HIDDEN, gpu_variables, visible_gpu
from inference.process.child_handle import ChildHandle
from tests.support.world import eventually
from worker.cli.check.machine import check_gpu
from worker.supervisor import Supervisor

GB = 10**9
UUIDS = "GPU-aa,GPU-bb"
SLICE = "MIG-11111111-2222"


@pytest.mark.parametrize(
    ("device", "listed", "visible"),
    [
        ("auto", None, None),
        ("cuda", None, None),
        ("cuda:0", None, "0"),
        ("cuda:3", None, "3"),
        ("cuda", "2,5", "2"),
        ("cuda:1", "2,5", "5"),
        ("cuda:1", " 2 , 5 ", "5"),
        ("cuda:1", UUIDS, "GPU-bb"),
        ("cuda:0", SLICE, SLICE),
        # What hides every GPU goes on hiding it
        ("cuda", "", HIDDEN),
        ("auto", "-1", HIDDEN),
        ("cuda:0", "-1,0", HIDDEN),
        ("cuda", "none", HIDDEN),
        ("cuda", "1,1", HIDDEN),
        # and what CUDA does not read behind a wrong entry is not read here.
        ("cuda", "4,-1,5", "4"),
    ],
)
def test_one_gpu_is_visible(device: str, listed: str | None, visible: str | None) -> None:
    assert visible_gpu(device, listed) == visible


@pytest.mark.parametrize(
    ("device", "listed", "words"),
    [
        ("cuda:2", "2,5", "names 2 of them"),
        ("cuda:1", "4,-1,5", "names 1 of them"),
        ("cuda:1", "GPU-aa,3", "names 1 of them"),
        ("cuda:1", "", "hides every GPU"),
    ],
)
def test_a_number_beyond_the_list_is_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, device: str, listed: str, words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setenv("DEVICE", device)

    with pytest.raises(SettingsError) as caught:
        load_section(ModelSettings)

    assert str(caught.value) == f"DEVICE: {device} counts within CUDA_VISIBLE_DEVICES={listed}, which {words}"


def test_a_process_that_draws_on_the_cpu_is_given_no_gpu_s_variables() -> None:
    assert gpu_variables("cpu", "2,5") == {}


# --- Where the setting comes from


@pytest.fixture
def env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Write a `.env` that the settings read; CUDA_VISIBLE_DEVICES is not in the environment."""
    monkeypatch.setitem(ModelSettings.model_config, "env_file", ".env")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".env"


def test_an_empty_list_of_gpus_in_the_environment_hides_them_whatever_the_file_says(
    monkeypatch: pytest.MonkeyPatch, env_file: Path
) -> None:
    env_file.write_text("CUDA_VISIBLE_DEVICES=1\n")
    assert load_section(ModelSettings).visible_gpu == "1"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    assert load_section(ModelSettings).visible_gpu == HIDDEN


def test_an_empty_list_of_gpus_in_the_file_counts_as_not_set(env_file: Path) -> None:
    env_file.write_text("CUDA_VISIBLE_DEVICES=\n")

    assert load_section(ModelSettings).visible_gpu is None


def environment_of_child(settings: ModelSettings) -> dict[str, str]:
    child = ChildHandle.spawn(settings, module="tests.support.engine.fake_child")
    environ = Path(f"/proc/{child.process.pid}/environ")
    try:
        eventually(lambda: environ.read_bytes() != b"")  # Popen returns a moment before the kernel has it in place
        pairs = environ.read_bytes().decode().split("\0")
    finally:
        child.end(is_idle=False)
    return dict(pair.partition("=")[::2] for pair in pairs if pair)


def test_a_child_sees_the_gpu_that_the_file_names(env_file: Path) -> None:
    env_file.write_text("CUDA_VISIBLE_DEVICES=2,5\nDEVICE=cuda:1\n")

    given = environment_of_child(load_section(ModelSettings))

    assert (given["CUDA_VISIBLE_DEVICES"], given["CUDA_DEVICE_ORDER"]) == ("5", "PCI_BUS_ID")


@pytest.mark.usefixtures("env_file")
def test_a_child_is_left_the_choice_where_no_gpu_is_named() -> None:
    given = environment_of_child(load_section(ModelSettings))

    assert "CUDA_VISIBLE_DEVICES" not in given
    assert given["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


# --- Who looks at it from outside


class Memory(NamedTuple):
    used: int
    total: int


class Driver:
    """NVML of a machine with eight GPUs; number N has N GB in use."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pynvml, "nvmlInit", lambda: None)
        patch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        patch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda index: Memory(index * GB, 80 * GB))
        patch.setattr(pynvml, "nvmlDeviceGetName", lambda index: f"GPU number {index}")
        patch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "1.0")
        patch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", self._no_rates)

    def _no_rates(self, _index: int) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver().install(monkeypatch)


@pytest.mark.parametrize(
    ("device", "listed", "number"), [("cuda:1", "2,5", 5), ("auto", "6", 6), ("cuda:3", None, 3), ("cuda", None, 0)]
)
def test_check_queries_the_gpu_of_the_engine(device: str, listed: str | None, number: int) -> None:
    settings = ModelSettings(DEVICE=device, CUDA_VISIBLE_DEVICES=listed)

    assert check_gpu(settings).startswith(f"GPU number {number}, ")


def worker_settings(model: ModelSettings, folder: Path) -> Settings:
    required = {
        "AWS_STORAGE_BUCKET_NAME": "media",
        "CACHE_DIR": str(folder),
        "METRICS_PORT": "0",
        "BACKEND_API_URL": "http://127.0.0.1:9",
        "INTERNAL_API_TOKEN": "token",
    }
    return Settings(**{name: section(**required) for name, section in SECTIONS.items()} | {"model": model})  # type: ignore[arg-type]


def test_the_metrics_are_of_the_gpu_that_draws(tmp_path: Path) -> None:
    supervisor = Supervisor(worker_settings(ModelSettings(DEVICE="cuda:1", CUDA_VISIBLE_DEVICES="2,5"), tmp_path))

    reading = supervisor._parts.gauges._gpu.read()

    assert reading is not None
    assert reading.memory_used_bytes == 5 * GB


def test_hidden_gpu_is_never_queried() -> None:
    settings = ModelSettings(DEVICE="cuda:0", CUDA_VISIBLE_DEVICES="-1")

    assert GpuMonitor(settings.visible_gpu).read() is None
