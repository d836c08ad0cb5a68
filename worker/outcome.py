"""How a delivery or a job ended."""

from enum import StrEnum


class Outcome(StrEnum):
    """How it ended, in a word: the label of the jobs metric, and the word in logs and on the status page."""

    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"  # to a backend a failure with the code CANCELLED
    RETRIED = "retried"  # a copy waits in a retry queue
    RELEASED = "released"  # the broker delivers it again
    ADOPTED = "adopted"  # a delivery of a job that runs already: it is settled with that run
    UNDECODABLE = "undecodable"  # no job, or a job whose record cannot be read: a dead letter
