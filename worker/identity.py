"""Tell whether two messages are one job: publishers reuse a `task_id` for another generation, or for other data."""

import hashlib
import json
import uuid
from dataclasses import replace

from worker.job import Job, JobRejected
from worker.messages import MAX_BODY_BYTES
from worker.schema import WireData


class TaskIdTaken(Exception):
    """The `task_id` belongs to a job of another generation: this message needs an id of its own."""


class DataDiffers(Exception):
    """The `task_id` belongs to a job of the same generation that was asked for with other data."""


def fingerprint(body: bytes) -> str:
    """SHA-256 over the fields of `data` that a job is made of, whatever their order; over all bytes of what is no job.

    Unknown fields and all that is beside `data` are left out: a publisher that repeats a message may count its tries or
    write the time anew.
    """
    if len(body) > MAX_BODY_BYTES:  # parsed, it would take many times its size
        return hashlib.sha256(body).hexdigest()
    try:
        given = json.loads(body)["data"]
        asked = {name: given[name] for name in sorted(WireData.model_fields.keys() & given.keys())}
        content = json.dumps({name: value for name, value in asked.items() if value is not None}, sort_keys=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha256(content.encode()).hexdigest()


def check_same(asked: Job | JobRejected, body: bytes, known_generation_id: object, known_fingerprint: str) -> None:
    """Raise `TaskIdTaken` or `DataDiffers` where `body`'s task id is known with another generation or other data.

    An empty fingerprint, as in records of older workers, is that of any data.
    """
    if str(asked.generation_id) != str(known_generation_id):
        raise TaskIdTaken(f"task_id {asked.task_id} is generation {known_generation_id}'s")
    if known_fingerprint and known_fingerprint != fingerprint(body):
        raise DataDiffers(f"task_id {asked.task_id} was used before with other data")


def own_task_id(task_id: str, generation_id: object) -> str:
    """The id that a generation's job gets where another generation has its `task_id`; the same each time."""
    return str(uuid.uuid5(uuid.UUID(task_id), f"generation {generation_id}"))


def with_own_id(asked: Job | JobRejected) -> Job | JobRejected:
    """The same job, or rejection, under its `own_task_id`."""
    task_id = own_task_id(asked.task_id, asked.generation_id)
    if isinstance(asked, Job):
        return replace(asked, task_id=task_id)
    return JobRejected(asked.code, str(asked), task_id=task_id, generation_id=asked.generation_id)
