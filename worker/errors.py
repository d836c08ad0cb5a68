"""Errors that end a job's run, apart from those of the engine and the store, and the codes of failed jobs."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """Why a job failed, as the failed webhook says it."""

    INVALID_INPUT = "INVALID_INPUT"
    INVALID_PROMPT = "INVALID_PROMPT"
    UNSUPPORTED_ASPECT_RATIO = "UNSUPPORTED_ASPECT_RATIO"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    INPUT_FORBIDDEN = "INPUT_FORBIDDEN"
    INPUT_TOO_LARGE = "INPUT_TOO_LARGE"
    UNSUPPORTED_BY_MODEL = "UNSUPPORTED_BY_MODEL"
    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    IMAGE_INVALID = "IMAGE_INVALID"
    LORA_NOT_FOUND = "LORA_NOT_FOUND"
    LORA_INVALID = "LORA_INVALID"
    LORA_INCOMPATIBLE = "LORA_INCOMPATIBLE"
    LORA_UNSUPPORTED = "LORA_UNSUPPORTED"
    LORA_UNSAFE_FORMAT = "LORA_UNSAFE_FORMAT"
    SIGNATURE_NOT_FOUND = "SIGNATURE_NOT_FOUND"
    SIGNATURE_INVALID = "SIGNATURE_INVALID"
    FONT_MISSING = "FONT_MISSING"
    GPU_OOM = "GPU_OOM"
    OUTPUT_INVALID = "OUTPUT_INVALID"
    NSFW_CONTENT = "NSFW_CONTENT"
    CANCELLED = "CANCELLED"
    ENGINE_CRASHED = "ENGINE_CRASHED"
    JOB_TIMEOUT = "JOB_TIMEOUT"
    WORKER_CRASHED = "WORKER_CRASHED"
    ENGINE_ERROR = "ENGINE_ERROR"
    STORAGE_UNAVAILABLE = "STORAGE_UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"


class JobFailed(Exception):
    """The job cannot be done; its backend gets `code` and the message."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class JobReleased(Exception):
    """This worker stops before the job is done; the broker delivers it to another one."""


class CuttingFailed(Exception):
    """The cut-out process crashed, hung or cannot use its model; the message says how."""


class PoisonJob(Exception):
    """The job ran in too many workers that were killed: it is not tried again."""
