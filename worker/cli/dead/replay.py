"""Decide what replaying a dead letter publishes. Pure: no I/O, no clock."""

import itertools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from clients.webhooks import WebhookKind
from worker.cli.dead.letters import DeadLetter, LetterKind
from worker.messages.envelope import MAX_BODY_BYTES
from worker.messages.identity import own_task_id
from worker.messages.job import Job, JobRejected
from worker.results.terminal_event import TerminalEvent


class NotReplayable(Exception):
    """A replay of the letter would have no effect, or the same again; the message says why."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The body to publish for a letter of this kind, and a sentence on the effect."""

    kind: LetterKind
    body: bytes
    effect: str


def plan_replay(letter: DeadLetter, find: Callable[[str], TerminalEvent | None]) -> Replay:
    """Plan the replay of `letter`. `find` looks up a task's recorded end. Raises `NotReplayable`."""
    match letter.content:
        case None:
            raise NotReplayable("it holds no job and no webhook that could be tried again")
        case JobRejected() as rejection:
            raise NotReplayable(f"it would only fail as {rejection.code}: {rejection}")
        case TerminalEvent() as event:
            known = find(event.task_id)
            # Another generation's end under the id says nothing of this one, which is recorded under an id of its own.
            if known is not None and known.is_delivered and str(known.generation_id) == str(event.generation_id):
                raise NotReplayable("the backend has taken a webhook for this job already")
            effect = f"webhook {event.webhook.webhook_id} goes out again, for up to a day"
            return Replay(LetterKind.EVENT, letter.message.body, effect)
        case Job() as job:
            return _plan_job(job, letter.message.body, find)


def _plan_job(job: Job, body: bytes, find: Callable[[str], TerminalEvent | None]) -> Replay:
    """Give the job a new id: under the old one its end is recorded, and a worker would generate nothing.

    The new id is derived from the old, so that a replay interrupted before its ack is the same job when it is repeated.
    """
    old_id = job.task_id
    known = find(old_id)
    if known is not None and str(known.generation_id) != str(job.generation_id):
        old_id = own_task_id(old_id, job.generation_id)
        known = find(old_id)
    if known is not None and known.kind is WebhookKind.COMPLETE:
        raise NotReplayable("the job is recorded as complete")
    task_id = _next_task_id(old_id, find)
    message = json.loads(body) | {"task_id": task_id, "replay_of": old_id}
    renamed = json.dumps(message).encode()
    if len(renamed) > MAX_BODY_BYTES:
        raise NotReplayable(f"with its new id the message would be longer than {MAX_BODY_BYTES} bytes")
    return Replay(LetterKind.JOB, renamed, f"generation {job.generation_id} is tried again as task {task_id}")


def _next_task_id(task_id: str, find: Callable[[str], TerminalEvent | None]) -> str:
    """Return the first id derived from `task_id` that has no recorded end."""
    for count in itertools.count(1):
        successor = str(uuid.uuid5(uuid.UUID(task_id), f"replay {count}"))
        end = find(successor)
        if end is None:
            return successor
        if end.kind is WebhookKind.COMPLETE:
            raise NotReplayable(f"its replay, task {successor}, is recorded as complete")
    raise AssertionError("a count has no end")
