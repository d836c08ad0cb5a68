"""Decode a cancel order: which task, or which generation, is to end. Pure."""

import json
import uuid
from dataclasses import dataclass

from config.redacting import quoted
from worker.messages.generation_id import ID_RULE, GenerationId, is_generation_id, is_same
from worker.messages.job import Undecodable

MAX_BODY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """The job to cancel: by its task, or the job that now runs for its generation."""

    task_id: str | None
    generation_id: GenerationId | None

    def names(self, task_id: str, generation_id: GenerationId) -> bool:
        """Return True where the order is for this job."""
        return task_id == self.task_id or (self.task_id is None and is_same(generation_id, self.generation_id))


def decode_cancel(body: bytes) -> CancelOrder:
    """Decode `{"task_id": …}` or `{"generation_id": …}`. Raises `Undecodable`."""
    try:
        fields = json.loads(body.decode("utf-8-sig")) if len(body) <= MAX_BODY_BYTES else None
    except (ValueError, RecursionError) as error:
        raise Undecodable("a cancel order must be JSON of at most 4 kB") from error
    if not isinstance(fields, dict):
        raise Undecodable("a cancel order must be a JSON object of at most 4 kB")

    task_id, generation_id = fields.get("task_id"), fields.get("generation_id")
    if isinstance(task_id, str) and 0 < len(task_id) <= 64:
        try:
            return CancelOrder(str(uuid.UUID(task_id)), None)
        except ValueError as error:
            raise Undecodable(f"task_id {quoted(task_id)} is no UUID") from error
    if is_generation_id(generation_id):
        return CancelOrder(None, generation_id)
    raise Undecodable(f"a cancel order names a task_id (a UUID) or a generation_id ({ID_RULE})")
