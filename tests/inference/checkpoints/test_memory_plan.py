"""What fits is decided by figures alone; models that take turns are on the device one at a time, in any order."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.accelerate_utils import apply_forward_hook

from clients.gpu import GpuMonitor, GpuUsage
from config.model import ModelSettings
from inference.checkpoints import memory_plan
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.memory_plan import (
    RESERVE_BYTES,
    Placement,
    free_bytes,
    free_host_bytes,
    most_adapter_bytes,
    place,
    plan,
    plan_and_warn,
)
from inference.checkpoints.offload import offload_in_turns
from inference.checkpoints.pipeline import load_pipeline
from inference.errors import EngineStartFailed
from tests.support.models.tiny_models import build_tiny_sd
from worker.cli.check.checks import CheckFailed
from worker.cli.check.machine import check_memory

SDXL = {"text_encoder": 246_000_000, "text_encoder_2": 1_389_000_000, "unet": 5_135_000_000, "vae": 167_000_000}
TOTAL = sum(SDXL.values())


@pytest.mark.parametrize(
    ("free", "placement"),
    [
        (24_000_000_000, Placement.RESIDENT),
        (TOTAL + RESERVE_BYTES, Placement.RESIDENT),
        (TOTAL + RESERVE_BYTES - 1, Placement.OFFLOADED),
        (SDXL["unet"] + RESERVE_BYTES, Placement.OFFLOADED),
    ],
)
def test_models_stay_where_all_fit_and_are_offloaded_in_turn_where_the_largest_fits(
    free: int, placement: Placement
) -> None:
    assert plan(SDXL, free) is placement


def test_a_model_whose_largest_part_does_not_fit_is_refused_with_the_figures() -> None:
    with pytest.raises(EngineStartFailed) as caught:
        plan(SDXL, SDXL["unet"] + RESERVE_BYTES - 1)

    words = ("unet takes 5.1 GB", "2.0 GB", "7.1 GB are free", "DTYPE", "WEIGHTS to nf4")
    assert all(word in str(caught.value) for word in words)


def test_offloading_is_logged_as_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert plan_and_warn("cuda", SDXL, 8_000_000_000) is Placement.OFFLOADED

    (record,) = caplog.records
    fields = vars(record)["fields"]
    assert record.levelno == logging.WARNING
    assert (fields["needed_gb"], fields["free_gb"], fields["reserve_gb"]) == (6.94, 8.0, 2.0)
    assert "every picture is slower" in fields["advice"]


def test_cpu_model_is_not_offloaded_and_short_memory_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert plan_and_warn("cpu", SDXL, TOTAL) is Placement.RESIDENT
        assert caplog.records == []
        assert plan_and_warn("cpu", SDXL, TOTAL - 1) is Placement.RESIDENT

    assert "larger than the free memory" in caplog.text


# --- Adapters


def test_memory_that_is_kept_for_adapters_is_part_of_what_must_be_free() -> None:
    adapters = 4_000_000_000

    assert plan(SDXL, TOTAL + RESERVE_BYTES + adapters, adapters) is Placement.RESIDENT
    assert plan(SDXL, TOTAL + RESERVE_BYTES + adapters - 1, adapters) is Placement.OFFLOADED
    with pytest.raises(EngineStartFailed) as caught:
        plan(SDXL, SDXL["unet"] + RESERVE_BYTES + adapters - 1, adapters)
    assert all(words in str(caught.value) for words in ("and ADAPTER_MEMORY_GB 4.0 GB,", "lower ADAPTER_MEMORY_GB"))


def test_adapters_that_cause_offloading_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert plan_and_warn("cuda", SDXL, TOTAL + RESERVE_BYTES, 1_000_000_000) is Placement.OFFLOADED

    fields = vars(caplog.records[0])["fields"]
    assert fields["adapters_gb"] == 1.0
    assert fields["advice"].endswith("lower ADAPTER_MEMORY_GB")


@pytest.mark.parametrize(
    ("chosen", "free", "placement", "most"),
    [
        (5_000_000_000, 24_000_000_000, Placement.RESIDENT, 5_000_000_000),
        (None, TOTAL + 4_000_000_000, Placement.RESIDENT, 1_000_000_000),
        (None, SDXL["unet"] + 4_000_000_000, Placement.OFFLOADED, 1_000_000_000),
        (None, TOTAL - 1, Placement.RESIDENT, 0),
    ],
)
def test_adapters_take_what_is_chosen_or_a_quarter_of_what_the_weights_leave(
    chosen: int | None, free: int, placement: Placement, most: int
) -> None:
    assert most_adapter_bytes(chosen, SDXL, free, placement) == most


# --- Free memory


def cgroup(folder: Path, *, limit: str, used: int = 0, cached: int = 0) -> tuple[str, str, str, str]:
    (folder / "limit").write_text(f"{limit}\n")
    (folder / "used").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ncache {cached}\n")
    return str(folder), "limit", "used", "cache"


@pytest.mark.parametrize(("limit", "free"), [("max", 2048), ("1500", 1200), ("400", 100), ("99999", 2048)])
def test_free_host_memory_is_within_the_container_s_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, free: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2 kB\n")
    monkeypatch.setattr(memory_plan, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(
        memory_plan, "CGROUPS", [cgroup(tmp_path, limit=limit, used=350, cached=50), ("/no", "a", "b", "c")]
    )

    assert free_host_bytes() == free


def test_this_machine_has_free_memory() -> None:
    assert free_bytes(torch.device("cpu")) == pytest.approx(free_host_bytes(), rel=0.5)
    assert free_host_bytes() > 100_000_000


# --- Taking turns


# What is brought there is a copy, also where the device is this one: residence shows in the weights' addresses.
DEVICE = torch.device("cpu:0")


class Stage(torch.nn.Linear):
    """A model of one layer, which can be called as a VAE is."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


class Pipeline:
    """As much of a pipeline as placing it needs."""

    def __init__(self) -> None:
        self.text_encoder, self.unet, self.vae = Stage(), Stage(), Stage()
        self.moved_to: torch.device | None = None
        self._hosts = {name: model.weight.data_ptr() for name, model in self._models.items()}

    @property
    def components(self) -> dict[str, Any]:
        return {"text_encoder": self.text_encoder, "tokenizer": object(), "unet": self.unet, "vae": self.vae}

    def to(self, device: torch.device) -> None:
        self.moved_to = device

    @property
    def on_device(self) -> set[str]:
        return {name for name, model in self._models.items() if model.weight.data_ptr() != self._hosts[name]}

    @property
    def _models(self) -> dict[str, Stage]:
        return {name: model for name, model in self.components.items() if isinstance(model, Stage)}


def test_one_model_at_a_time_is_on_the_device_in_whatever_order_they_are_called() -> None:
    pipeline = Pipeline()
    offload_in_turns(pipeline, DEVICE)

    # As the engine does it: pictures end and prompts come in between two steps
    with torch.inference_mode():
        for name in ("text_encoder", "unet", "unet", "vae", "unet", "text_encoder", "unet", "vae", "text_encoder"):
            model = pipeline.components[name]
            _ = model.decode(torch.zeros(1, 2)) if name == "vae" else model(torch.zeros(1, 2))

            # Then what was there before is its own host memory again, and not a copy of it
            assert pipeline.on_device == {name}


def test_a_model_that_is_called_again_and_again_is_moved_once() -> None:
    pipeline = Pipeline()
    offload_in_turns(pipeline, DEVICE)

    pipeline.unet(torch.zeros(1, 2))
    there = pipeline.unet.weight.data_ptr()
    pipeline.unet(torch.zeros(1, 2))

    assert pipeline.unet.weight.data_ptr() == there


def test_offloaded_pipeline_draws_the_same(tmp_path: Path) -> None:
    folder = build_tiny_sd(tmp_path / "sd")
    resident, turning = (load_pipeline(identify(str(folder), None), torch.float32) for _ in range(2))
    offload_in_turns(turning, DEVICE)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    drawn = []
    for pipe in (resident, turning):
        with torch.inference_mode():
            embeddings, _ = pipe.encode_prompt(["a fox", "a crow"], DEVICE, 1, False)
            latents = pipe.unet(x, torch.tensor(3.0), embeddings, return_dict=False)[0]
            drawn.append(pipe.vae.decode(latents, return_dict=False)[0])

    assert turning.vae._hf_hook._slot._taken_by is turning.vae
    assert turning._execution_device == DEVICE
    assert torch.equal(*drawn)


def test_placement_follows_the_plan() -> None:
    resident, offloaded = Pipeline(), Pipeline()

    place(resident, DEVICE, Placement.RESIDENT)
    place(offloaded, DEVICE, Placement.OFFLOADED)
    offloaded.unet(torch.zeros(1, 2))

    assert (resident.moved_to, offloaded.moved_to) == (DEVICE, None)
    assert (resident.on_device, offloaded.on_device) == (set(), {"unet"})


# --- What `darkroom check` foretells


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (24_000_000_000, "24.0 GB of the GPU's are free: the model stays on the GPU, with up to 6.0 GB for adapters"),
        (2_001_000_000, None),
        (2_003_000_000, "its parts take turns on the GPU, which is slower, with up to 0.5 GB for adapters"),
    ],
)
def test_check_predicts_the_engine_s_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, words: str | None
) -> None:
    # Given a model of 3 MB of weights at 16 bits, 2.9 of them the UNet's, and a GPU
    settings = ModelSettings.model_validate({"MODEL_ID": str(build_tiny_sd(tmp_path / "sd"))})
    gpu = GpuUsage(memory_used_bytes=1_000, memory_total_bytes=free + 1_000, utilization_ratio=None)
    monkeypatch.setattr(GpuMonitor, "read", lambda _: gpu)

    if words is None:
        with pytest.raises(CheckFailed, match="unet"):
            check_memory(settings)
    else:
        message = check_memory(settings)
        assert "0.00 GB of weights at 16 bits and 2.0 GB for a picture" in message
        assert words in message


@pytest.mark.parametrize(
    ("storage", "bits"), [("auto", ""), ("fp8", ", large layers at 8"), ("nf4", ", large layers at 4")]
)
def test_check_names_the_bits_of_the_weights(tmp_path: Path, storage: str, bits: str) -> None:
    model = {"MODEL_ID": str(build_tiny_sd(tmp_path / "sd")), "DEVICE": "cpu", "DTYPE": "float32"}

    message = check_memory(ModelSettings.model_validate(model | {"WEIGHTS": storage}))

    assert re.search(rf"GB of weights at 32 bits{bits}, \d", message)
