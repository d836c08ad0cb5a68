"""Disposition: how a delivery is settled, decided from the error that ended its job. Pure."""

from dataclasses import dataclass
from enum import Enum, auto

from clients.storage.errors import StorageError
from inference.errors import (
    EngineClosed,
    EngineCrashed,
    EngineFault,
    EngineHung,
    EngineStartFailed,
    RequestCancelled,
    RequestFailed,
    ResultTooLarge,
)
from worker.amqp.topology import RETRY_DELAYS_SECONDS
from worker.errors import CuttingFailed, ErrorCode, JobFailed, JobReleased, PoisonJob

MAX_ATTEMPTS = len(RETRY_DELAYS_SECONDS) + 1

# Deliveries from `.recover` before a job counts as the one that kills supervisors. Generous: a job that merely shared
# a worker with ten kills must still complete.
MAX_RECOVERIES = 10


# Codes of jobs that take processes down; a person should look at such a job, so a copy is kept.
_DEADLY_CODES: dict[type[Exception], ErrorCode] = {
    EngineCrashed: ErrorCode.ENGINE_CRASHED,
    EngineHung: ErrorCode.JOB_TIMEOUT,
    PoisonJob: ErrorCode.WORKER_CRASHED,
}


class Disposition(Enum):
    """What happens to a delivery; each member says what must be safe before the broker forgets it."""

    ACK = auto()  # the end is recorded and the backend was told, or a confirmed copy waits in the outbox
    RETRY = auto()  # a confirmed copy waits in a retry queue
    DEAD_LETTER = auto()  # a confirmed copy is in the dead letter queue
    RELEASE = auto()  # nothing: the broker keeps the message and delivers it again


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a job whose handler raised: fail it with a code, retry it after a delay, or release it."""

    disposition: Disposition
    code: ErrorCode | None = None
    message: str = ""
    delay_seconds: int = 0


def decide(error: BaseException, attempt: int) -> Decision:
    """Return how to settle a job whose attempt number `attempt` (1-based) raised `error`.

    ACK means: record and report the failure with the decision's code, then ack. An error that is not known to be the
    job's own fault is retried, and fails the job only once all attempts are used up.
    """
    match error:
        case JobFailed() | RequestFailed():
            return Decision(Disposition.ACK, ErrorCode(error.code), str(error))
        case RequestCancelled():
            return Decision(Disposition.ACK, ErrorCode.CANCELLED, "the job was cancelled")
        case EngineCrashed() | EngineHung() | PoisonJob():
            return Decision(Disposition.DEAD_LETTER, _DEADLY_CODES[type(error)], str(error))
        case JobReleased() | EngineClosed() | EngineStartFailed():
            return Decision(Disposition.RELEASE)
        case StorageError():
            return _retry(attempt, ErrorCode.STORAGE_UNAVAILABLE, f"the object store failed {attempt} times: {error}")
        case EngineFault():
            return _retry(attempt, ErrorCode.ENGINE_ERROR, f"the engine failed {attempt} times: {error}")
        case ResultTooLarge() | MemoryError():
            return _retry_memory_once(attempt, error)
        case _:
            what = f"cutting the product out failed {attempt} times: {error}"
            if not isinstance(error, CuttingFailed):
                what = f"the worker failed {attempt} times: {type(error).__name__}"
            return _retry(attempt, ErrorCode.INTERNAL_ERROR, what)


def _retry(attempt: int, code: ErrorCode, message: str) -> Decision:
    if attempt >= MAX_ATTEMPTS:
        return Decision(Disposition.DEAD_LETTER, code, message)
    return Decision(Disposition.RETRY, code, message, RETRY_DELAYS_SECONDS[attempt - 1])


def _retry_memory_once(attempt: int, error: ResultTooLarge | MemoryError) -> Decision:
    """Retry a job that ran out of memory once: the jobs beside it may have used it, and are done by then."""
    message = "the worker has no memory for the job's pictures: ask for fewer or smaller ones"
    if isinstance(error, ResultTooLarge):
        message = str(error)
    if attempt > 1:
        return Decision(Disposition.ACK, ErrorCode.GPU_OOM, message)
    return Decision(Disposition.RETRY, ErrorCode.GPU_OOM, message, RETRY_DELAYS_SECONDS[0])
