"""The engine's errors: each ends a request's future, or the start."""


class EngineError(Exception):
    """Base of every error that the engine reports."""


class RequestFailed(EngineError):
    """This request cannot be drawn, now or later: `code` for machines, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


class RequestCancelled(EngineError):
    """The caller cancelled the request before it began or between two denoise steps."""


class EngineFault(EngineError):
    """An unforeseen error; another try may succeed."""


class ResultTooLarge(EngineError):
    """The images were drawn, but the requesting process has no memory to receive them."""


class EngineCrashed(EngineError):
    """The engine's process died under this request on every try."""


class EngineHung(EngineError):
    """The engine made no step for far too long under this request, on every try."""


class EngineStartFailed(EngineError):
    """The model could not be loaded; the message says what to do."""


class EngineClosed(EngineError):
    """The engine is shutting down or has given up; the request was not drawn."""
