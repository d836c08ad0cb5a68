"""What decoding a job needs at every field: the worker's rules, and how a job is refused in its own name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from clients.storage.location import LocationForbidden, ObjectRef
from config.presets.catalog import Presets, builtin_presets
from config.redacting import redacted
from inference.checkpoints.weight_files import PICKLE_SUFFIXES
from worker.messages.generation_id import GenerationId
from worker.messages.job import JobRejected

MAX_REASON_CHARS = 400


@dataclass(frozen=True, slots=True)
class JobRules:
    """What the worker's settings say about jobs; None: the model's family knows."""

    default_steps: int | None
    default_guidance: float | None
    locate: Callable[[str], ObjectRef]
    presets: Callable[[], Presets] = builtin_presets


class Identity(NamedTuple):
    """The ids a job is known by."""

    task_id: str
    generation_id: GenerationId


class Rejection(NamedTuple):
    """Makes `JobRejected`s that carry the job's ids."""

    identity: Identity

    def __call__(self, code: str, message: str) -> JobRejected:
        return JobRejected(code, redacted(message)[:MAX_REASON_CHARS], **self.identity._asdict())


def located(field: str, text: str | None, rules: JobRules, reject: Rejection) -> ObjectRef | None:
    """Where the object is that `field` names; None where it names none."""
    if not text:
        return None
    try:
        return rules.locate(text)
    except LocationForbidden as error:
        raise reject("INPUT_FORBIDDEN", f"{field}: {error}") from error


def is_pickle(ref: ObjectRef) -> bool:
    """Return whether the object's name ends as pickles do, in any case."""
    return ref.key.lower().endswith(PICKLE_SUFFIXES)
