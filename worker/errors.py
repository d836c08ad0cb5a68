"""What ends a job's run early, apart from the errors of the engine and the store."""


class JobFailed(Exception):
    """The job cannot be done: its backend is told `code` and the message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class JobReleased(Exception):
    """This worker stops before the job is done: another one shall do it."""


class CuttingFailed(Exception):
    """The process that cuts products out crashed, hung or cannot use its model; the message says how."""


class PoisonJob(Exception):
    """The job was at work in too many workers that were killed: it is not tried again."""
