"""The journal of a campaign: all that its checks and a resumed campaign need, a line of JSON each."""

import dataclasses
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True)
class Began:
    """A campaign began, or went on after a break: the first one says with what. Times are Unix seconds everywhere."""

    at: float
    campaign: str
    seed: int
    num_jobs: int
    num_actions: int
    num_workers: int
    has_real_engine: bool
    bucket: str
    queue: str


@dataclass(frozen=True)
class Published:
    """The broker confirmed a job. `num_steps`: what drawing it once counts as; `must_fail`: its adapter is missing."""

    at: float
    generation_id: int
    task_id: str
    num_images: int
    num_steps: int
    must_fail: bool


@dataclass(frozen=True)
class ReceivedWebhook:
    """The backend heard a webhook.

    `digest` is one of what the body says, in whatever order.
    `answer`: "taken"; "lost" for taken and the answer lost on purpose; "refused" for a failure of the backend's.
    `mark` is what the ledger's record said when a repeat came: "open", "marked" as delivered, or "unknown" where the
    store did not answer; `marked_seconds_ago` is as exact as the store's times: a second.
    """

    at: float
    kind: str
    webhook_id: str
    generation_id: int
    answer: str
    digest: str = ""
    code: str = ""
    mark: str = ""
    marked_seconds_ago: float = 0.0

    @property
    def is_end(self) -> bool:
        return self.kind in ("complete", "failed") and self.answer in ("taken", "lost")


@dataclass(frozen=True)
class Acted:
    """Something was broken, or put right again."""

    at: float
    action: str
    detail: str


@dataclass(frozen=True)
class Ended:
    """A worker's process ended; `stopped_by` names what ended it ("kill", "sigterm" or nothing) and how long ago."""

    at: float
    life: int
    exit_code: int
    stopped_by: str
    seconds: float
    was_ready: bool


@dataclass(frozen=True)
class Counted:
    """What a worker has counted since it began: the engine's work, and the seconds it was idle without jobs."""

    at: float
    life: int
    lane_steps: float
    idle_seconds: float


Entry = Began | Published | ReceivedWebhook | Acted | Ended | Counted
E = TypeVar("E", bound=Entry)

_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Began, Published, ReceivedWebhook, Acted, Ended, Counted)
}


class Journal:
    """Owner of the file. Thread-safe; what `write` returned from outlives the process."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._entries = _read(path)
        self._file = path.open("a")

    def write(self, entry: Entry) -> None:
        line = json.dumps({"entry": type(entry).__name__} | dataclasses.asdict(entry))
        with self._lock:
            self._entries.append(entry)
            self._file.write(line + "\n")
            self._file.flush()

    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._entries)

    def all(self, kind: type[E]) -> list[E]:
        return only(self.entries(), kind)

    def close(self) -> None:
        self._file.close()


def only(entries: Iterable[Entry], kind: type[E]) -> list[E]:
    """List the entries of one kind, in order."""
    return [entry for entry in entries if isinstance(entry, kind)]


def _read(path: Path) -> list[Entry]:
    """Read the entries of an earlier run; a last line cut off by its end is removed."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [_entry(json.loads(line)) for line in whole.splitlines()]


def _entry(fields: dict[str, Any]) -> Entry:
    entry: Entry = _KINDS[fields.pop("entry")](**fields)
    return entry
