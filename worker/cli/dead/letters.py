"""A dead letter as decoded from its message, and the choice among several. Pure: no I/O, no clock."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from worker.amqp.delivery import ATTEMPT_HEADER, QUEUE_HEADER, REASON_HEADER, Origin, priority_of, whole_number
from worker.amqp.queue_browser import BrowsedMessage
from worker.cli.exits import CommandFailed
from worker.messages.decoder import decode_any
from worker.messages.generation_id import GenerationId
from worker.messages.job import Job, JobRejected, Undecodable
from worker.messages.rules import JobRules
from worker.results.terminal_event import TerminalEvent
from worker.tracing.context import TraceContext


class NoSuchLetter(CommandFailed):
    """No dead letter has that number or task id."""


class LetterKind(Enum):
    """What a letter's body decodes to."""

    JOB = "job"
    EVENT = "event"
    OTHER = "not a job"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter. `number` is 1-based, the oldest first; `task_id` is empty where none can be trusted."""

    number: int
    message: BrowsedMessage
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
        """Reason that a worker wrote into the header, or the broker's own, at a limit that a policy sets."""
        if own := self.message.headers.get(REASON_HEADER):
            return str(own)
        deaths = self.message.headers.get("x-death")
        newest = deaths[0] if isinstance(deaths, list) and deaths else None
        if not isinstance(newest, dict):
            return ""
        return f"the broker gave it up in {newest.get('queue')}: {newest.get('reason')} (look at its policies)"

    @property
    def attempt(self) -> int | None:
        return whole_number(self.message.headers.get(ATTEMPT_HEADER), default=0) or None

    @property
    def origin(self) -> Origin:
        """The origin of its job."""
        headers, priority = self.message.headers, priority_of(self.message.properties)
        return Origin(str(headers.get(QUEUE_HEADER, "")), priority, TraceContext.from_headers(headers))

    @property
    def died_at(self) -> datetime | None:
        try:
            return datetime.fromtimestamp(self.message.published_at, UTC) if self.message.published_at else None
        except (ValueError, OverflowError, OSError):
            return None  # another program's message: its timestamp may be milliseconds, or anything

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the letter, whatever its number or delivery tag."""
        identity = f"{self.message.published_at} {self.reason}".encode()
        return hashlib.sha256(identity + b"\0" + self.message.body).hexdigest()


def read_letters(taken: Iterable[BrowsedMessage], rules: JobRules) -> list[DeadLetter]:
    """Decode the messages into letters, the oldest first.

    The broker returns messages in any order, so the order comes from their content: a letter keeps its number until an
    older one is gone.
    """
    unordered = [DeadLetter(0, message, _decode_content(message.body, rules)) for message in taken]
    unordered.sort(key=lambda letter: (letter.message.published_at or 0, letter.fingerprint))
    return [DeadLetter(number, letter.message, letter.content) for number, letter in enumerate(unordered, 1)]


def _decode_content(body: bytes, rules: JobRules) -> Job | JobRejected | TerminalEvent | None:
    try:
        return TerminalEvent.from_json(body)
    except ValueError:
        pass
    try:
        return decode_any(body, rules)
    except Undecodable:
        return None


def choose(letters: list[DeadLetter], target: str | None, reason: str) -> list[DeadLetter]:
    """Return the letter of that number, or all of that task, or, without a target, all whose reason holds `reason`.

    Raises `NoSuchLetter` where a target is given and no letter matches.
    """
    if target is None:
        return [letter for letter in letters if reason.casefold() in letter.reason.casefold()]
    if target.isdecimal() and len(target) <= len(str(len(letters))):
        chosen = [letter for letter in letters if letter.number == int(target)]
    else:
        chosen = [letter for letter in letters if letter.task_id == target.lower()]
    if chosen:
        return chosen
    if not letters:
        raise NoSuchLetter("nothing is dead")
    count = "there is 1 dead letter" if len(letters) == 1 else f"there are {len(letters)} dead letters"
    raise NoSuchLetter(f"no dead letter goes by {target!r:.80}; {count}")
