"""One event, one line of JSON, at most 8 kB, with the job's ids bound once for everything its thread logs."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

MAX_LINE_BYTES = 8192
MAX_VALUE_CHARS = 2048
# In a line that was cut: one sign may take twelve bytes of escapes.
MAX_CUT_CHARS = 128

# urllib3 and botocore log request lines at DEBUG, httpx each hub request at INFO.
NOISY_LOGGERS = ("urllib3", "botocore", "boto3", "s3transfer", "httpx", "huggingface_hub", "PIL", "fontTools")

_bound: ContextVar[dict[str, Any]] = ContextVar("bound", default={})  # noqa: B039 - replaced whole, never changed


@contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Add `fields` to every line this thread logs inside the block."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def log_event(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log `event` with structured `fields`."""
    logger.log(level, event, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "event", …fields}`; json escapes what a prompt could forge a line with."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= _bound.get() | getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-MAX_VALUE_CHARS:]
        text = json.dumps({name: _short(value) for name, value in line.items()}, default=str)
        if len(text) <= MAX_LINE_BYTES:
            return text
        kept = {name: _short(line[name], MAX_CUT_CHARS) for name in ("time", "level", "logger", "event", *_bound.get())}
        return json.dumps(kept | {"cut": len(text)}, default=str)


def configure_logging(level: str) -> None:
    """Send every logger to standard output as JSON lines; third parties only from WARNING on."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # pika prints hosts and whole connections, also for what is expected; worker.broker logs every loss itself.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    # A closed or full stdout must not print a traceback for every line; the job goes on.
    logging.raiseExceptions = False


def _short(value: Any, max_chars: int = MAX_VALUE_CHARS) -> Any:
    if isinstance(value, str) and len(value) > max_chars:
        return value[:max_chars] + "…"
    return value
