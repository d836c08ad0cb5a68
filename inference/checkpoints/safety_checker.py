"""The safety checker of a checkpoint: its files, its loading, and its check of an image. Imports torch only to load."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inference.checkpoints.weight_files import Weights, find_weights
from inference.errors import EngineStartFailed, RequestFailed

if TYPE_CHECKING:
    import torch

CHECKER = "safety_checker"
EXTRACTOR = "feature_extractor"
CODE = "NSFW_CONTENT"
# The one kind of pipeline whose checkpoints may bring a checker.
PIPELINE_CLASS = "StableDiffusionPipeline"


class SafetyChecker:
    """The loaded checker of a pipeline."""

    def __init__(self, pipeline: Any, device: "torch.device") -> None:
        self._checker = pipeline.safety_checker
        self._extractor = pipeline.feature_extractor
        self._device = device

    def check(self, pixels: NDArray[np.uint8]) -> None:
        """Raise `RequestFailed` where the picture [height, width, 3] is flagged, as the plain pipeline flags it."""
        features = self._extractor(Image.fromarray(pixels), return_tensors="pt").pixel_values
        # The checker blackens flagged images in the list that it gets.
        _, flags = self._checker(clip_input=features.to(self._device, self._checker.dtype), images=[pixels])
        if any(flags):
            raise RequestFailed(CODE, "the model's safety checker flagged the picture, which was not stored")


def require_checker(subject: str, pipeline_class: str, index: Mapping[str, Any] | None) -> None:
    """Raise `EngineStartFailed` where the checkpoint has no checker by its index (None: it is a single file)."""
    if pipeline_class != PIPELINE_CLASS:
        lack = f"is a {pipeline_class}, which has none"
    elif index is None:
        lack = "is a single file, which holds none"
    elif not all(any(index.get(name) or ()) for name in (CHECKER, EXTRACTOR)):
        lack = "ships none"
    else:
        return
    remedy = f"name a diffusers folder or hub id of a {PIPELINE_CLASS} with a {CHECKER} and a {EXTRACTOR}"
    raise EngineStartFailed(f"SAFETY_CHECKER is on, but {subject} {lack}: {remedy}, or set it to off")


def find_checker(folder: Path) -> Weights:
    """Find the checker's weight files in a diffusers folder."""
    return find_weights(folder, (CHECKER,))


def add_checker(pipeline: Any, folder: Path, dtype: "torch.dtype") -> None:
    """Load the checker as one of the pipeline's models."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker  # noqa: PLC0415
    from transformers import CLIPImageProcessor  # noqa: PLC0415

    checker = StableDiffusionSafetyChecker.from_pretrained(
        folder / CHECKER, dtype=dtype, use_safetensors=True, variant=find_checker(folder).variant, local_files_only=True
    )
    # By the class and not by the index: older ones name a class that transformers has no more.
    extractor = CLIPImageProcessor.from_pretrained(folder / EXTRACTOR, local_files_only=True)
    pipeline.register_modules(safety_checker=checker, feature_extractor=extractor)
