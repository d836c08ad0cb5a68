"""The worker's rules for jobs, and the making of rejections."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from clients.storage.location import LocationForbidden, ObjectRef
from config.model import DEFAULT_MODEL
from config.presets.catalog import Presets, builtin_presets
from config.redacting import quoted, redacted
from inference.checkpoints.weight_files import PICKLE_SUFFIXES
from worker.messages.generation_id import GenerationId
from worker.messages.job import JobRejected

MAX_REASON_CHARS = 400


@dataclass(frozen=True, slots=True)
class JobRules:
    """The settings that concern jobs, of the default model; None: the family has its own default."""

    default_steps: int | None
    default_guidance: float | None
    locate: Callable[[str], ObjectRef]
    presets: Callable[[], Presets] = builtin_presets
    default_rescale: float = 0.0
    model_names: tuple[str, ...] = (DEFAULT_MODEL,)

    def of_model(self, name: str) -> "JobRules":
        """Return the rules for jobs of that model: the settings' defaults are the default model's."""
        if name == DEFAULT_MODEL:
            return self
        return replace(self, default_steps=None, default_guidance=None, default_rescale=0.0)


class Identity(NamedTuple):
    """The ids of a job."""

    task_id: str
    generation_id: GenerationId


class Rejection(NamedTuple):
    """Factory of `JobRejected`s that carry the job's ids."""

    identity: Identity

    def __call__(self, code: str, message: str) -> JobRejected:
        """Return a rejection, its message redacted and cut to `MAX_REASON_CHARS`."""
        return JobRejected(code, redacted(message)[:MAX_REASON_CHARS], **self.identity._asdict())


def located(field: str, text: str | None, rules: JobRules, reject: Rejection) -> ObjectRef | None:
    """Return the location that `field` names; None where it is empty. Raises `JobRejected`."""
    if not text:
        return None
    try:
        return rules.locate(text)
    except LocationForbidden as error:
        raise reject("INPUT_FORBIDDEN", f"{field}: {error}") from error


def shown_value(value: Any) -> str:
    """Format a value of the message for a sentence: 40 characters of a scalar, nothing of a list or an object."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'JSON object'}"
    return f"{value!r:.40}"


def is_pickle(ref: ObjectRef) -> bool:
    """Return whether the object's name ends as pickles do, in any case."""
    return ref.key.lower().endswith(PICKLE_SUFFIXES)
