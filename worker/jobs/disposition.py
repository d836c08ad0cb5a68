"""Deciding, apart from doing: what becomes of a delivery once its job's story has ended. Pure."""

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
from worker.errors import CuttingFailed, JobFailed, JobReleased, PoisonJob

MAX_ATTEMPTS = len(RETRY_DELAYS_SECONDS) + 1

# Deliveries out of `.recover` before a job is taken for the one that kills supervisors. Generous: a job that merely
# shared a worker with ten kills must still complete.
MAX_RECOVERIES = 10


# What a job fails with that takes processes down; a person should look at such a job, so a copy is kept.
_DEADLY_CODES: dict[type[Exception], str] = {
    EngineCrashed: "ENGINE_CRASHED",
    EngineHung: "JOB_TIMEOUT",
    PoisonJob: "WORKER_CRASHED",
}


class Disposition(Enum):
    """What happens to a delivery; each member says what must be safe before the broker forgets it."""

    ACK = auto()  # the end is recorded and the backend was told, or a confirmed copy waits in the outbox
    RETRY = auto()  # a confirmed copy waits in a retry queue
    DEAD_LETTER = auto()  # a confirmed copy is in the dead letter queue
    RELEASE = auto()  # nothing: the broker keeps it and gives it to somebody else


@dataclass(frozen=True, slots=True)
class Verdict:
    """How to go on after a story broke off: fail the job with a code, try it again later, or let it go."""

    disposition: Disposition
    code: str = ""
    message: str = ""
    delay_seconds: int = 0


def judge(error: BaseException, attempt: int) -> Verdict:
    """What `error`, met in attempt number `attempt` (1-based), means for the job.

    ACK means: record and report the failure with the verdict's code, then ack. Whatever is not known to be the job's
    own fault is tried again, and fails the job only once the budget of tries is spent.
    """
    match error:
        case JobFailed() | RequestFailed():
            return Verdict(Disposition.ACK, error.code, str(error))
        case RequestCancelled():
            return Verdict(Disposition.ACK, "CANCELLED", "the job was cancelled")
        case EngineCrashed() | EngineHung() | PoisonJob():
            return Verdict(Disposition.DEAD_LETTER, _DEADLY_CODES[type(error)], str(error))
        case JobReleased() | EngineClosed() | EngineStartFailed():
            return Verdict(Disposition.RELEASE)
        case StorageError():
            return _again(attempt, "STORAGE_UNAVAILABLE", f"the object store failed {attempt} times: {error}")
        case EngineFault():
            return _again(attempt, "ENGINE_ERROR", f"the engine failed {attempt} times: {error}")
        case ResultTooLarge() | MemoryError():
            return _once_more(attempt, error)
        case _:
            what = f"cutting the product out failed {attempt} times: {error}"
            if not isinstance(error, CuttingFailed):
                what = f"the worker failed {attempt} times: {type(error).__name__}"
            return _again(attempt, "INTERNAL_ERROR", what)


def _again(attempt: int, code: str, message: str) -> Verdict:
    if attempt >= MAX_ATTEMPTS:
        return Verdict(Disposition.DEAD_LETTER, code, message)
    return Verdict(Disposition.RETRY, code, message, RETRY_DELAYS_SECONDS[attempt - 1])


def _once_more(attempt: int, error: ResultTooLarge | MemoryError) -> Verdict:
    """For want of memory: the jobs beside it may have taken it the first time, and are done by the second."""
    message = "the worker has no memory for the job's pictures: ask for fewer or smaller ones"
    if isinstance(error, ResultTooLarge):
        message = str(error)
    if attempt > 1:
        return Verdict(Disposition.ACK, "GPU_OOM", message)
    return Verdict(Disposition.RETRY, "GPU_OOM", message, RETRY_DELAYS_SECONDS[0])
