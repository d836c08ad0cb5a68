"""Identify what a UNet predicts by the marks in its file, which the configs beside a single file cannot know of."""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from inference.checkpoints.weight_files import Header
from inference.errors import EngineStartFailed

# Tensors beside the weights, of any shape, by name: as ComfyUI writes them and as it and Forge read them.
VELOCITY = "v_pred"
ZERO_SNR = "ztsnr"
# The models whose noise levels are not those of a chain of 1000 timesteps.
EDM_MARKS = {"edm_mean": "Playground 2.5", "edm_vpred.sigma_max": "CosXL"}
# ModelSpec's entry and ComfyUI's. Of their values velocity alone is read: trainers and mergers write `epsilon` into
# files of either kind.
METADATA_ENTRIES = ("modelspec.prediction_type", "modelspec.predict_key")
VELOCITY_VALUES = ("v", "v_prediction")
# Classes in a pipeline's index by their beginnings. The schedulers of jobs would ignore such a config.
UNSUPPORTED_SCHEDULERS = ("EDM", "FlowMatch")


class Prediction(Enum):
    """What a file says of its UNet's prediction."""

    UNMARKED = auto()
    VELOCITY = auto()
    VELOCITY_ZERO_SNR = auto()  # with noise alone at the last timestep of the training


# What each sets in a scheduler's config. Only trailing timesteps begin at the last one.
SCHEDULER_VALUES: dict[Prediction, dict[str, Any]] = {
    Prediction.UNMARKED: {},
    Prediction.VELOCITY: {"prediction_type": "v_prediction"},
    Prediction.VELOCITY_ZERO_SNR: {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


def prediction_of(header: Header, subject: str) -> Prediction:
    """Return the file's prediction; EngineStartFailed, about `subject`, where no scheduler here can sample it."""
    for mark, example in EDM_MARKS.items():
        if mark in header.names:
            raise EngineStartFailed(
                f"{subject} has {mark}: it was trained on EDM's noise levels, as {example} was, which this version"
                " cannot run"
            )
    if VELOCITY in header.names:
        return Prediction.VELOCITY_ZERO_SNR if ZERO_SNR in header.names else Prediction.VELOCITY
    is_velocity = any(header.metadata.get(entry) in VELOCITY_VALUES for entry in METADATA_ENTRIES)
    return Prediction.VELOCITY if is_velocity else Prediction.UNMARKED


def check_scheduler(index: Mapping[str, Any], subject: str) -> None:
    """Raise EngineStartFailed where a pipeline with a UNet has a scheduler whose noise levels jobs' would not take."""
    entry = index.get("scheduler")
    name = str(entry[-1]) if isinstance(entry, list) and entry else ""
    if "unet" in index and name.startswith(UNSUPPORTED_SCHEDULERS):
        raise EngineStartFailed(
            f"{subject} is sampled by a {name}: this version runs UNets with the noise levels of Stable Diffusion alone"
        )
