"""What a dead letter is, what replaying it means, and how it is shown. Pure: no I/O, no clock."""

import hashlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from rich.table import Table
from rich.text import Text

from clients.webhooks import WebhookKind
from worker.amqp.delivery import ATTEMPT_HEADER, REASON_HEADER, whole_number
from worker.amqp.queue_browser import BrowsedMessage
from worker.cli.terminal import escape_for_terminal, narrow_table
from worker.messages.decoder import MAX_BODY_BYTES, decode_any
from worker.messages.generation_id import GenerationId
from worker.messages.identity import own_task_id
from worker.messages.job import Job, JobRejected, Undecodable
from worker.messages.rules import JobRules
from worker.results.terminal_event import TerminalEvent

MAX_LISTED_REASON_CHARS = 160


class NoSuchLetter(Exception):
    """Nothing among the dead letters goes by that number or task id."""


class NotReplayable(Exception):
    """A replay of the letter would do nothing, or the same again; the message says why."""


class LetterKind(Enum):
    """What a letter's body turns out to be."""

    JOB = "job"
    EVENT = "event"
    OTHER = "not a job"


# As docs/dead-letters.md calls them; in --json they keep the names that scripts know.
WORDS = {LetterKind.JOB: "job", LetterKind.EVENT: "webhook", LetterKind.OTHER: "not a job"}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter, read. `number` is 1-based, by the time of dying; `task_id` is empty where none can be trusted."""

    number: int
    held: BrowsedMessage
    content: Job | JobRejected | TerminalEvent | None

    @property
    def kind(self) -> LetterKind:
        match self.content:
            case None:
                return LetterKind.OTHER
            case TerminalEvent():
                return LetterKind.EVENT
            case _:
                return LetterKind.JOB

    @property
    def task_id(self) -> str:
        return self.content.task_id if self.content is not None else ""

    @property
    def generation_id(self) -> GenerationId | None:
        return self.content.generation_id if self.content is not None else None

    @property
    def reason(self) -> str:
        """Why a worker put it there, or the broker, at a limit that a policy sets."""
        return str(self.held.headers.get(REASON_HEADER) or _reason_of_broker(self.held.headers.get("x-death")))

    @property
    def attempt(self) -> int | None:
        return whole_number(self.held.headers.get(ATTEMPT_HEADER), default=0) or None

    @property
    def died_at(self) -> datetime | None:
        try:
            return datetime.fromtimestamp(self.held.published_at, UTC) if self.held.published_at else None
        except (ValueError, OverflowError, OSError):
            return None  # somebody else's letter: its stamp may be milliseconds, or anything

    @property
    def fingerprint(self) -> str:
        """Tells this letter from others, whatever place or delivery it comes by."""
        told = f"{self.held.published_at} {self.reason}".encode()
        return hashlib.sha256(told + b"\0" + self.held.body).hexdigest()


@dataclass(frozen=True, slots=True)
class Replay:
    """What to publish for a letter, for whom, and a sentence on what comes of it."""

    kind: LetterKind
    body: bytes
    said: str


def read_letters(taken: Iterable[BrowsedMessage], rules: JobRules) -> list[DeadLetter]:
    """The letters, the oldest first.

    The broker gives messages back in any order, so the order comes from what is in them: a number stays with its letter
    until an older one is gone.
    """
    unordered = [DeadLetter(0, held, _content(held.body, rules)) for held in taken]
    unordered.sort(key=lambda letter: (letter.held.published_at or 0, letter.fingerprint))
    return [DeadLetter(number, letter.held, letter.content) for number, letter in enumerate(unordered, 1)]


def _reason_of_broker(deaths: Any) -> str:
    """Of its list of dead-letterings, the newest first, what the newest says; nothing of a list of another shape."""
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    if not isinstance(newest, dict):
        return ""
    return f"the broker gave it up in {newest.get('queue')}: {newest.get('reason')} (look at its policies)"


def choose(letters: list[DeadLetter], target: str | None, reason: str) -> list[DeadLetter]:
    """The letter of that number, or all of that task, or, without a target, all whose reason holds `reason`.

    Raises `NoSuchLetter` where a target is given and nothing goes by it.
    """
    if target is None:
        return [letter for letter in letters if reason.casefold() in letter.reason.casefold()]
    if target.isdecimal() and len(target) <= len(str(len(letters))):
        chosen = [letter for letter in letters if letter.number == int(target)]
    else:
        chosen = [letter for letter in letters if letter.task_id == target.lower()]
    if not chosen:
        raise NoSuchLetter(_none_by(target, len(letters)))
    return chosen


def plan_replay(letter: DeadLetter, find: Callable[[str], TerminalEvent | None]) -> Replay:
    """How `letter` comes to be tried again. `find` looks up a task's recorded end. Raises `NotReplayable`."""
    match letter.content:
        case None:
            raise NotReplayable("it holds no job and no webhook that could be tried again")
        case JobRejected() as rejection:
            raise NotReplayable(f"it would only fail as {rejection.code}: {rejection}")
        case TerminalEvent() as event:
            return _plan_event(event, letter.held.body, find)
        case Job() as job:
            return _plan_job(job, letter.held.body, find)


def _plan_event(event: TerminalEvent, body: bytes, find: Callable[[str], TerminalEvent | None]) -> Replay:
    known = find(event.task_id)
    # Another generation's end under the id says nothing of this one, which is recorded under an id of its own.
    if known is not None and known.is_delivered and str(known.generation_id) == str(event.generation_id):
        raise NotReplayable("the backend has taken a webhook for this job already")
    return Replay(LetterKind.EVENT, body, f"webhook {event.webhook.webhook_id} goes out again, for up to a day")


def _plan_job(job: Job, body: bytes, find: Callable[[str], TerminalEvent | None]) -> Replay:
    """A job of a new id: under the old one its end is told and recorded, and a worker would draw nothing.

    The new id is made of the old, so that a replay interrupted before its ack is the same job when it is repeated.
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
    """The first id made of `task_id` that has no recorded end."""
    for count in itertools.count(1):
        successor = str(uuid.uuid5(uuid.UUID(task_id), f"replay {count}"))
        end = find(successor)
        if end is None:
            return successor
        if end.kind is WebhookKind.COMPLETE:
            raise NotReplayable(f"its replay, task {successor}, is recorded as complete")
    raise AssertionError("a count has no end")


def as_table(letters: Iterable[DeadLetter]) -> Table:
    """One row a letter, readable at 80 columns; `show` has its attempt."""
    table = narrow_table("#", "letter", "generation", "died, UTC", "reason, and the task")
    for letter in letters:
        generation = "" if letter.generation_id is None else str(letter.generation_id)
        died_at = "" if letter.died_at is None else f"{letter.died_at:%Y-%m-%d\n%H:%M:%S}"
        told = (letter.reason[:MAX_LISTED_REASON_CHARS], str(letter.task_id))
        cells = (str(letter.number), WORDS[letter.kind], generation, died_at)
        table.add_row(*map(Text, cells), Text("\n".join(escape_for_terminal(text) for text in told if text)))
    return table


def as_json(letter: DeadLetter) -> str:
    """One line for scripts."""
    fields = {
        "number": letter.number,
        "kind": letter.kind.value,
        "task_id": letter.task_id or None,
        "generation_id": letter.generation_id,
        "died_at": letter.died_at.isoformat() if letter.died_at else None,
        "attempt": letter.attempt,
        "reason": letter.reason,
        "body_bytes": len(letter.held.body),
    }
    return escape_for_terminal(json.dumps(fields))


def as_text(letter: DeadLetter) -> str:
    """Everything about one letter, fit for a terminal."""
    told: dict[str, object] = {
        "task": letter.task_id,
        "generation": letter.generation_id,
        "died": letter.died_at,
        "reason": letter.reason,
    }
    if isinstance(letter.content, TerminalEvent):
        told["webhook-id"] = letter.content.webhook.webhook_id
    told |= {f"header {name}": value for name, value in sorted(letter.held.headers.items())}
    lines = [f"letter {letter.number}: {WORDS[letter.kind]}"]
    lines += [
        f"  {escape_for_terminal(name)}: {escape_for_terminal(str(value))}"
        for name, value in told.items()
        if value not in ("", None)
    ]
    lines += [f"  body, {len(letter.held.body)} bytes:", *_body_lines(letter.held.body)]
    return "\n".join(lines)


def _body_lines(body: bytes) -> list[str]:
    try:
        text = json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "backslashreplace")
    return [escape_for_terminal(line) for line in text.split("\n")]


def _content(body: bytes, rules: JobRules) -> Job | JobRejected | TerminalEvent | None:
    try:
        return TerminalEvent.from_json(body)
    except ValueError:
        pass
    try:
        return decode_any(body, rules)
    except Undecodable:
        return None


def _none_by(target: str, num_letters: int) -> str:
    if num_letters == 0:
        return "nothing is dead"
    count = "there is 1 dead letter" if num_letters == 1 else f"there are {num_letters} dead letters"
    return f"no dead letter goes by {target!r:.80}; {count}"
