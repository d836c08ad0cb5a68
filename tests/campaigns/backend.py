"""A backend with bad days: it fails, hangs, cuts calls off, and sometimes takes a webhook and loses the answer."""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LookedTooLong
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from examples.parts.backend import ENDS, WEBHOOKS, Backend
from tests.campaigns.journal import Journal, ReceivedWebhook

ERROR = "error"
RESET = "reset"
HANG = "hang"
LOSE = "lose"
POISON = "poison"
STATUSES = (500, 503)

HANG_SECONDS = 30.0  # longer than the worker's deadline for a call
LOOK_SECONDS = 2.0


class Mark(NamedTuple):
    """Whether the ledger says that an event was delivered, and since when."""

    state: str
    seconds_ago: float = 0.0


class FlakyBackend(Backend):
    """Keeps the ids of what it has taken, as a backend should: an end has an effect once. Journals every webhook.

    It answers 500 for ever to the ends of `poisoned` generations, and takes none of them.
    `mishaps` are the shares of calls that come to grief, by kind of grief. `read_record` reads a task's record in the
    ledger and the seconds since it was written; it may raise botocore's errors.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        mishaps: Mapping[str, float],
        seed: int,
        read_record: Callable[[str], tuple[dict[str, Any], float]],
        poisoned: Collection[int] = (),
    ) -> None:
        super().__init__()
        self._journal_file = journal
        self._mishaps = dict(mishaps)
        self._rng = random.Random(seed)
        self._read_record = read_record
        self._poisoned = frozenset(poisoned)
        self._lock = threading.Lock()
        self._looks = ThreadPoolExecutor(4, thread_name_prefix="look")
        ends = [heard for heard in journal.all(ReceivedWebhook) if heard.is_end]
        self._taken = Counter(heard.webhook_id for heard in ends)
        self._ended = {heard.generation_id for heard in ends}

    @property
    def num_ended(self) -> int:
        return len(self._ended)

    def heal(self) -> None:
        """Stop all mishaps from now on."""
        with self._lock:
            self._mishaps.clear()

    def take(self, method: str, path: str, headers: dict[str, str], content: bytes) -> int:
        """Take a call as the base class does, but for the mishaps. Raises `ConnectionError` to cut the call off."""
        kind = WEBHOOKS.get((method, path), f"{method} {path}")
        mishap = POISON if self._is_poisoned(kind, content) else self._draw()
        if mishap in (ERROR, RESET, HANG, POISON):
            self._note(kind, headers, content, "refused", Mark(""))
            return self._refuse(mishap)

        status = super().take(method, path, headers, content)
        if status == 200:
            mark = self._look(headers["webhook-id"]) if self._is_repeat(headers["webhook-id"]) else Mark("")
            self._note(kind, headers, content, "lost" if mishap == LOSE else "taken", mark)
        if mishap == LOSE:
            raise ConnectionError("the answer is lost")
        return status

    def _is_poisoned(self, kind: str, content: bytes) -> bool:
        return kind in ENDS and json.loads(content).get("generation_id") in self._poisoned

    def _draw(self) -> str:
        with self._lock:
            point = self._rng.random()
            for mishap, share in self._mishaps.items():
                point -= share
                if point < 0:
                    return mishap
            return ""

    def _refuse(self, mishap: str) -> int:
        if mishap == POISON:
            return 500
        if mishap == ERROR:
            return self._rng.choice(STATUSES)
        if mishap == HANG:
            time.sleep(HANG_SECONDS)
        raise ConnectionError("the call is cut off")

    def _is_repeat(self, webhook_id: str) -> bool:
        """Count the event as taken; return whether it was before."""
        with self._lock:
            self._taken[webhook_id] += 1
            return self._taken[webhook_id] > 1 and webhook_id.rpartition(":")[2] in ("complete", "failed")

    def _look(self, webhook_id: str) -> Mark:
        """Read the ledger's mark; a store that is being broken on purpose must not delay the answer."""
        looking = self._looks.submit(self._read_record, webhook_id.partition(":")[0])
        try:
            record, seconds_ago = looking.result(LOOK_SECONDS)
        except (LookedTooLong, BotoCoreError, ClientError):
            return Mark("unknown")
        return Mark("marked", seconds_ago) if record["is_delivered"] else Mark("open")

    def _note(self, kind: str, headers: dict[str, str], content: bytes, answer: str, mark: Mark) -> None:
        body = json.loads(content)
        heard = ReceivedWebhook(
            at=time.time(),
            kind=kind,
            webhook_id=headers.get("webhook-id", ""),
            generation_id=body.get("generation_id", 0),
            answer=answer,
            digest=hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16],
            code=body.get("error_code", ""),
            mark=mark.state,
            marked_seconds_ago=round(mark.seconds_ago, 3),
        )
        self._journal_file.write(heard)
        if heard.is_end:
            self._ended.add(heard.generation_id)
