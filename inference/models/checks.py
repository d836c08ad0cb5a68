"""Checks of a request against the loaded model."""

from collections.abc import Sequence

from config.redacting import quoted
from inference.errors import RequestFailed
from inference.latents.source import check_size
from inference.request import GenerationRequest


def check_cfg_options(request: GenerationRequest, family: str) -> None:
    """Raise `RequestFailed` where the request has options of guidance that only Z-Image supports."""
    if request.cfg_normalization or request.cfg_truncation != 1:
        reason = f"cfg_normalization and cfg_truncation belong to Z-Image; this worker runs {family}"
        raise RequestFailed("INVALID_INPUT", reason)


def check_guidance_rescale(request: GenerationRequest, family: str) -> None:
    """Raise `RequestFailed` where the request has a rescaling of guidance, which the families with a flow have not."""
    if request.guidance_rescale:
        reason = f"guidance_rescale belongs to Stable Diffusion and SDXL; this worker runs {family}"
        raise RequestFailed("INVALID_INPUT", reason)


def check_true_cfg(request: GenerationRequest, family: str) -> None:
    """Raise `RequestFailed` where the request has the option of guidance that only FLUX.1 supports."""
    if request.true_cfg_scale != 1:
        raise RequestFailed("INVALID_INPUT", f"true_cfg_scale belongs to FLUX.1; this worker runs {family}")


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
