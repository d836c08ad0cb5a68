"""Compare two messages with one `task_id`: publishers reuse it for another generation, or for other data."""

import hashlib
import json
import logging
import uuid
from dataclasses import replace

from config.logs import log_event
from worker.messages.envelope import MAX_BODY_BYTES
from worker.messages.job import Job, JobRejected
from worker.messages.schema import WireData

logger = logging.getLogger(__name__)

_OWN_IDS = uuid.UUID("1c1ab1f4-6f5e-4c39-9d0c-6a1a6b6e2b57")


class TaskIdTaken(Exception):
    """The `task_id` belongs to a job of another generation: this message needs an id of its own."""


def fingerprint(body: bytes) -> str:
    """Return the SHA-256 of the known fields of `data`, in any order; of all bytes where the body is no job.

    Unknown fields and everything outside `data` are left out: a publisher that repeats a message may count its tries or
    write a new time.
    """
    if len(body) > MAX_BODY_BYTES:  # parsed, it would take many times its size
        return hashlib.sha256(body).hexdigest()
    try:
        given = json.loads(body)["data"]
        known = {name: given[name] for name in sorted(WireData.model_fields.keys() & given.keys())}
        content = json.dumps({name: value for name, value in known.items() if value is not None}, sort_keys=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return hashlib.sha256(body).hexdigest()
    return hashlib.sha256(content.encode()).hexdigest()


def check_same(job: Job | JobRejected, body: bytes, known_generation_id: object, known_fingerprint: str) -> None:
    """Raise `TaskIdTaken` where `body`'s task id is known with another generation.

    With other data of the same generation the known job's end holds for this message too, which is logged. An empty
    fingerprint, as in records of older workers, matches any data.
    """
    if str(job.generation_id) != str(known_generation_id):
        raise TaskIdTaken(f"task_id {job.task_id} is generation {known_generation_id}'s")
    if known_fingerprint and known_fingerprint != fingerprint(body):
        log_event(
            logger,
            "message dropped",
            logging.WARNING,
            task_id=job.task_id,
            generation_id=job.generation_id,
            reason="its task_id was used before with other data of this generation, and one task has one end",
        )


def own_task_id(task_id: str, generation_id: object) -> str:
    """Derive the id of a generation's job whose `task_id` another generation has; the same each time."""
    # As text: an event in the outbox may hold an id of any type, written by another program.
    return str(uuid.uuid5(_OWN_IDS, f"{task_id} of generation {generation_id}"))


def with_own_id(job: Job | JobRejected) -> Job | JobRejected:
    """Return the same job, or rejection, under its `own_task_id`."""
    task_id = own_task_id(job.task_id, job.generation_id)
    if isinstance(job, Job):
        return replace(job, task_id=task_id)
    return JobRejected(job.code, str(job), task_id=task_id, generation_id=job.generation_id)
