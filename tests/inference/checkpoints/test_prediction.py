"""Single files that say what their UNet predicts, against the plain pipeline whose config says the same."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import EulerDiscreteScheduler

from inference.checkpoints.checkpoint import identify
from inference.checkpoints.pipeline import load_pipeline
from inference.engine.local_engine import LocalEngine
from inference.errors import EngineStartFailed
from tests.support.engine.engine_requests import request_of
from tests.support.images.parity import DIFFERENT_DB, MIN_PSNR_DB, draw, psnr, settings_of
from tests.support.models.ldm_layout import write_single_file
from tests.support.models.plain_families import drawn_by
from tests.support.models.tiny_models import build_tiny_sd, build_tiny_sd2, build_tiny_sdxl, load_pipe

pytestmark = pytest.mark.usefixtures("one_thread")

VELOCITY = {"prediction_type": "v_prediction"}
ZERO_SNR = VELOCITY | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
NOISE = {"prediction_type": "epsilon", "timestep_spacing": "leading"}
REQUEST = request_of(width=64, height=64, num_inference_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an SDXL whose config says that it predicts noise."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def scheduler_of(
    path: Path, folder: Path, *, marks: Sequence[str] = (), metadata: Mapping[str, str] | None = None
) -> Any:
    """Load the folder's weights from a single file with these marks, beside the folder's configs."""
    write_single_file(path, load_pipe(folder), marks=marks, metadata=metadata)
    return load_pipeline(identify(str(path), str(folder)), torch.float32).scheduler.config


@pytest.mark.parametrize(
    ("marks", "metadata", "said"),
    [
        (("v_pred", "ztsnr"), None, ZERO_SNR),
        (("v_pred",), None, VELOCITY | {"timestep_spacing": "leading"}),
        ((), None, NOISE),
        # As ComfyUI, which reads it beside the other one alone.
        (("ztsnr",), None, NOISE),
        ((), {"modelspec.prediction_type": "v"}, VELOCITY),
        ((), {"modelspec.predict_key": "v"}, VELOCITY),
        ((), {"modelspec.prediction_type": "epsilon"}, NOISE),
        # As a merger writes it into whatever it has merged.
        (("v_pred", "ztsnr"), {"modelspec.prediction_type": "epsilon"}, ZERO_SNR),
    ],
)
def test_marks_of_a_single_file_win_over_its_config(
    folder: Path,
    tmp_path: Path,
    marks: Sequence[str],
    metadata: Mapping[str, str] | None,
    said: Mapping[str, Any],
) -> None:
    config = scheduler_of(tmp_path / "a.safetensors", folder, marks=marks, metadata=metadata)

    assert {key: config[key] for key in said} == said
    assert config.get("rescale_betas_zero_snr", False) is said.get("rescale_betas_zero_snr", False)


def test_marks_without_elements_are_read(folder: Path, tmp_path: Path) -> None:
    # As ComfyUI writes them, and of a type that is no weight's.
    weights = safetensors.torch.load_file(write_single_file(tmp_path / "a.safetensors", load_pipe(folder)))
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([], dtype=torch.uint8)}
    safetensors.torch.save_file(weights | marks, tmp_path / "b.safetensors")

    config = load_pipeline(identify(str(tmp_path / "b.safetensors"), str(folder)), torch.float32).scheduler.config

    assert {key: config[key] for key in ZERO_SNR} == ZERO_SNR


def test_marked_single_file_draws_what_plain_diffusers_draws_with_that_config(folder: Path, tmp_path: Path) -> None:
    marked = write_single_file(tmp_path / "marked.safetensors", load_pipe(folder), marks=("v_pred", "ztsnr"))
    engine = LocalEngine(settings_of(marked, MODEL_CONFIG=str(folder)))
    plain = load_pipe(folder)
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config, **ZERO_SNR)

    drawn = draw(engine, REQUEST)[0]

    engine.close()
    assert psnr(drawn, drawn_by(plain, REQUEST)) >= MIN_PSNR_DB
    assert psnr(drawn, drawn_by(load_pipe(folder), REQUEST)) < DIFFERENT_DB


def test_config_without_a_rescaling_scheduler_takes_the_rescaling(tmp_path: Path) -> None:
    # Stable Diffusion 1.5's is PNDM's, which has none.
    folder = build_tiny_sd(tmp_path / "sd")

    config = scheduler_of(tmp_path / "a.safetensors", folder, marks=("v_pred", "ztsnr"))

    assert {key: config[key] for key in ZERO_SNR} == ZERO_SNR


def test_stable_diffusion_2_predicts_what_its_config_says_unless_it_is_marked(tmp_path: Path) -> None:
    velocity = build_tiny_sd2(tmp_path / "768")
    assert scheduler_of(tmp_path / "a.safetensors", velocity)["prediction_type"] == "v_prediction"

    path = velocity / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))
    assert scheduler_of(tmp_path / "b.safetensors", velocity)["prediction_type"] == "epsilon"
    marked = scheduler_of(tmp_path / "c.safetensors", velocity, metadata={"modelspec.prediction_type": "v"})
    assert marked["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        (("edm_mean", "edm_std"), ("edm_mean", "Playground 2.5")),
        (("edm_vpred.sigma_max", "edm_vpred.sigma_min"), ("edm_vpred.sigma_max", "CosXL")),
        # As ComfyUI saves CosXL.
        (("edm_vpred.sigma_max", "v_pred"), ("edm_vpred.sigma_max", "CosXL")),
    ],
)
def test_single_file_of_edm_is_refused(
    folder: Path, tmp_path: Path, marks: Sequence[str], words: Sequence[str]
) -> None:
    path = write_single_file(tmp_path / "a.safetensors", load_pipe(folder), marks=marks)

    with pytest.raises(EngineStartFailed) as caught:
        identify(str(path), str(folder))

    assert all(word in str(caught.value) for word in (*words, "MODEL_ID", "cannot run")), caught.value


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_folder_whose_scheduler_has_other_noise_levels_is_refused(tmp_path: Path, name: str) -> None:
    folder = build_tiny_sdxl(tmp_path / "sdxl")
    single = write_single_file(tmp_path / "a.safetensors", load_pipe(folder))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))

    with pytest.raises(EngineStartFailed, match=f"MODEL_ID .*{name}"):
        identify(str(folder), None)
    with pytest.raises(EngineStartFailed, match=f"MODEL_CONFIG .*{name}"):
        identify(str(single), str(folder))
