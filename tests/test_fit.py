"""What fits is decided by figures alone; models that take turns are on the device one at a time, in any order."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.accelerate_utils import apply_forward_hook

from inference import fit
from inference.checkpoints import identify, load_pipeline
from inference.fit import RESERVE_BYTES, Residence, decide, foresee, free_bytes, free_host_bytes, place
from inference.offload import take_turns
from inference.request import EngineStartFailed
from tests.tiny_models import build_tiny_sd

SDXL = {"text_encoder": 246_000_000, "text_encoder_2": 1_389_000_000, "unet": 5_135_000_000, "vae": 167_000_000}
TOTAL = sum(SDXL.values())


@pytest.mark.parametrize(
    ("free", "residence"),
    [
        (24_000_000_000, Residence.RESIDENT),
        (TOTAL + RESERVE_BYTES, Residence.RESIDENT),
        (TOTAL + RESERVE_BYTES - 1, Residence.OFFLOADED),
        (SDXL["unet"] + RESERVE_BYTES, Residence.OFFLOADED),
    ],
)
def test_models_stay_where_there_is_room_for_all_and_take_turns_where_there_is_for_the_largest(
    free: int, residence: Residence
) -> None:
    assert decide(SDXL, free) is residence


def test_a_model_whose_largest_part_does_not_fit_is_refused_with_the_figures() -> None:
    with pytest.raises(EngineStartFailed) as caught:
        decide(SDXL, SDXL["unet"] + RESERVE_BYTES - 1)

    assert all(word in str(caught.value) for word in ("unet takes 5.1 GB", "2.0 GB", "7.1 GB are free", "DTYPE"))


def test_offloading_is_said_in_one_loud_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert foresee("cuda", SDXL, 8_000_000_000) is Residence.OFFLOADED

    (record,) = caplog.records
    told = vars(record)["fields"]
    assert record.levelno == logging.WARNING
    assert (told["needed_gb"], told["free_gb"], told["reserve_gb"]) == (6.94, 8.0, 2.0)
    assert "every picture is slower" in told["advice"]


def test_a_cpu_s_model_stays_and_memory_that_is_short_is_only_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert foresee("cpu", SDXL, TOTAL) is Residence.RESIDENT
        assert caplog.records == []
        assert foresee("cpu", SDXL, TOTAL - 1) is Residence.RESIDENT

    assert "larger than the free memory" in caplog.text


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
    monkeypatch.setattr(fit, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(fit, "CGROUPS", [cgroup(tmp_path, limit=limit, used=350, cached=50), ("/no", "a", "b", "c")])

    assert free_host_bytes() == free


def test_this_machine_has_free_memory() -> None:
    assert free_bytes(torch.device("cpu")) == pytest.approx(free_host_bytes(), rel=0.5)
    assert free_host_bytes() > 100_000_000


# --- Taking turns


class Stage(torch.nn.Module):
    """A model that notes where it is sent."""

    def __init__(self, name: str, diary: list[tuple[str, str]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._name, self._diary = name, diary

    def to(self, *args: Any, **kwargs: Any) -> "Stage":
        self._diary.append((self._name, "in" if args[0] == torch.device("cpu:0") else "out"))
        return super().to(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


class Pipeline:
    """As much of a pipeline as placing it needs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.diary: list[tuple[str, str]] = []
        self.components: dict[str, Any] = {name: Stage(name, self.diary) for name in names} | {"tokenizer": object()}
        self.moved_to: torch.device | None = None

    def to(self, device: torch.device) -> None:
        self.moved_to = device


def offloaded() -> Pipeline:
    """Its device is the CPU under another name, so that moving is seen and needs no GPU."""
    pipeline = Pipeline(["text_encoder", "unet", "vae"])
    take_turns(pipeline, torch.device("cpu:0"))
    pipeline.diary.clear()
    return pipeline


def test_one_model_at_a_time_is_on_the_device_in_whatever_order_they_are_called() -> None:
    pipeline = offloaded()
    x = torch.zeros(1)

    # As the engine does it: pictures end and prompts come in between two steps
    for name in ("text_encoder", "unet", "unet", "vae", "unet", "text_encoder", "unet", "vae", "text_encoder"):
        model = pipeline.components[name]
        _ = model.decode(x) if name == "vae" else model(x)

    on_device: set[str] = set()
    for name, way in pipeline.diary:
        on_device = on_device | {name} if way == "in" else on_device - {name}
        assert len(on_device) <= 1
    assert [name for name, way in pipeline.diary if way == "in"] == [
        *("text_encoder", "unet", "vae", "unet", "text_encoder", "unet", "vae", "text_encoder")
    ]


def test_a_model_that_is_called_again_and_again_is_moved_once() -> None:
    pipeline = offloaded()

    for _ in range(5):
        pipeline.components["unet"](torch.zeros(1))

    assert pipeline.diary == [("unet", "in")]


def test_a_real_pipeline_that_takes_turns_draws_the_same(tmp_path: Path) -> None:
    folder = build_tiny_sd(tmp_path / "sd")
    resident, turning = (load_pipeline(identify(str(folder), None), torch.float32) for _ in range(2))
    device = torch.device("cpu:0")
    take_turns(turning, device)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    drawn = []
    for pipe in (resident, turning):
        with torch.inference_mode():
            embeddings, _ = pipe.encode_prompt(["a fox", "a crow"], device, 1, False)
            latents = pipe.unet(x, torch.tensor(3.0), embeddings, return_dict=False)[0]
            drawn.append(pipe.vae.decode(latents, return_dict=False)[0])

    assert turning.vae._hf_hook._seat._taken_by is turning.vae
    assert turning._execution_device == device
    assert torch.equal(*drawn)


def test_placing_does_as_decided() -> None:
    resident, offloading = Pipeline(["unet"]), Pipeline(["unet"])
    device = torch.device("cpu:0")

    place(resident, device, Residence.RESIDENT)
    place(offloading, device, Residence.OFFLOADED)

    assert resident.moved_to == device
    assert resident.diary == []
    assert offloading.moved_to is None
    assert offloading.diary == [("unet", "out")]
