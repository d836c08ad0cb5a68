"""Checks of a request against the loaded model."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from config.redacting import quoted
from inference.errors import RequestFailed
from inference.latents.source import check_size
from inference.request import GenerationRequest


class Option(NamedTuple):
    """A field of a request that some families alone have: its value where none is set, and the families' names."""

    unset: Any
    families: str


OPTIONS = {
    "guidance_rescale": Option(0, "Stable Diffusion and SDXL"),
    "cfg_normalization": Option(0, "Z-Image"),
    "cfg_truncation": Option(1, "Z-Image"),
    "true_cfg_scale": Option(1, "FLUX.1 and Qwen-Image"),
}


def check_options(request: GenerationRequest, supported: Collection[str], family: str) -> None:
    """Raise `RequestFailed` where the request sets one of `OPTIONS` that its family does not support."""
    for name, option in OPTIONS.items():
        if name not in supported and getattr(request, name) not in {None, option.unset}:
            raise RequestFailed("INVALID_INPUT", f"{name} belongs to {option.families}; this worker runs {family}")


def check_kind(request: GenerationRequest, kinds: Sequence[str]) -> None:
    """Raise `RequestFailed` where the checkpoint supports only other `kinds`."""
    if request.kind not in kinds:
        reason = f"this worker's model draws {', '.join(kinds)} and nothing else: not {request.kind}"
        raise RequestFailed("UNSUPPORTED_BY_MODEL", reason)


def check_source(request: GenerationRequest, num_steps: int) -> None:
    """Raise `RequestFailed` where `num_steps`, those that the source's strength leaves, are none."""
    if request.source is None:
        return
    check_size(request.source, size=(request.height, request.width))
    if num_steps < 1:
        given = f"strength {request.source.strength} of {request.num_inference_steps} steps"
        raise RequestFailed("INVALID_INPUT", f"{given} leaves no step: ask for a higher strength or for more steps")


def check_control(request: GenerationRequest, names: Sequence[str]) -> None:
    """Raise `RequestFailed` where the request's control model is none of `names`."""
    if request.control is not None and request.control.model not in names:
        known = f"has {', '.join(names)}" if names else "has none"
        reason = f"control model {quoted(request.control.model)} is not known; this worker {known}"
        raise RequestFailed("UNSUPPORTED_BY_MODEL", reason)
