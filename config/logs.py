"""Structured logs: one line of at most 8 kB an event, with the job's ids bound once for all events of its thread.

JSON for programs, on standard output; text for people, on standard error.
"""

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from config.redacting import CUT, redacted

MAX_LINE_BYTES = 8192
MAX_VALUE_CHARS = 2048
# Some minutes of a busy worker's events, up to 80 MB.
MAX_WAITING_LINES = 10_000
FLUSH_SECONDS = 2.0
# In a line that was cut: one character may take twelve bytes of escapes.
MAX_CUT_CHARS = 128

# urllib3 and botocore log request lines at DEBUG, httpx each hub request at INFO.
NOISY_LOGGERS = ("urllib3", "botocore", "boto3", "s3transfer", "httpx", "huggingface_hub", "PIL", "fontTools")

# `auto`: text where standard error is a terminal, and JSON unless that terminal would show it beside the text.
LogFormat = Literal["auto", "json", "text"]

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
    """Formatter of `{"time", "level", "logger", "event", …fields}`; JSON escapes line breaks, which could forge one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line |= _bound.get() | getattr(record, "fields", {})
        if record.exc_info:
            # Before it is cut: half a URL does not look like one.
            line["exception"] = redacted(self.formatException(record.exc_info))[-MAX_VALUE_CHARS:]
        text = json.dumps({name: _shorten(value) for name, value in line.items()}, default=str)
        if len(text) <= MAX_LINE_BYTES:
            return text
        kept = {
            name: _shorten(line[name], MAX_CUT_CHARS) for name in ("time", "level", "logger", "event", *_bound.get())
        }
        return json.dumps(kept | {"cut": len(text)}, default=str)


class TextFormatter(logging.Formatter):
    """Formatter of `12:34:56 WARNING event  name=value …` in local time; control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        event = _escape(_shorten(record.getMessage()))
        line = f"{moment} {level}{event}"
        fields = _bound.get() | getattr(record, "fields", {})
        if fields:
            line += "  " + " ".join(f"{_escape(name)}={_format_value(value)}" for name, value in fields.items())
        if record.exc_info:
            trace = redacted(self.formatException(record.exc_info))[-MAX_VALUE_CHARS:]
            line += "".join(f"\n    {_escape(one)}" for one in trace.splitlines())
        # One character takes four bytes at most.
        return line if len(line) <= MAX_LINE_BYTES // 4 else line[: MAX_LINE_BYTES // 4] + CUT


class BackgroundHandler(logging.Handler):
    """Owner of the thread that writes the lines: a pipe without a reader must block no job. Lines beyond
    `MAX_WAITING_LINES` are dropped, and counted in a line of their own once there is room."""

    def __init__(self, descriptor: int) -> None:
        """Write to `descriptor` directly: the lock of Python's own stream would delay the end of the process."""
        super().__init__()
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()
        self._num_dropped = 0
        self._is_writing = False
        threading.Thread(target=self._write_lines, name="logs", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        # Formatted here: bound fields belong to this thread.
        line = self.format(record)
        with self._changed:
            if len(self._lines) < MAX_WAITING_LINES:
                self._lines.append(line)
            else:
                self._num_dropped += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all lines are written, at most `FLUSH_SECONDS`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._is_writing, FLUSH_SECONDS)

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines))
                text = self._take_lines()
                self._is_writing = True
            with suppress(OSError):  # closed, or its disk is full: the job goes on
                while text:
                    text = text[os.write(self._descriptor, text) :]

    def _take_lines(self) -> bytes:
        lines = [*self._lines]
        self._lines.clear()
        if self._num_dropped:
            dropped = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": "log lines dropped"}
            lines.append(self.format(logging.makeLogRecord(dropped | {"fields": {"count": self._num_dropped}})))
            self._num_dropped = 0
        return "".join(f"{line}\n" for line in lines).encode()


def silence_imports() -> None:
    """Leave out what libraries say when they are imported: torchao of kernels that this machine cannot load, and two
    others of what they no longer need of it. Weights are kept in float8 without either.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)


def configure_logging(level: str, log_format: LogFormat = "auto") -> None:
    """Install the handlers of `log_format` on the root logger; third parties log from WARNING on."""
    has_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    has_json = log_format == "json" or (log_format == "auto" and not (has_text and sys.stdout.isatty()))
    handlers: list[logging.Handler] = []
    if has_json:
        handlers.append(BackgroundHandler(sys.stdout.fileno()))
        handlers[-1].setFormatter(JsonFormatter())
    if has_text:
        handlers.append(BackgroundHandler(sys.stderr.fileno()))
        handlers[-1].setFormatter(TextFormatter())
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # pika logs hosts and whole connections, also for expected events; worker.amqp.consumer logs every loss itself.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    silence_imports()
    # Pillow warns of odd signatures by `warnings`, which would print plain lines between ours.
    logging.captureWarnings(True)
    # A closed or full stdout must not print a traceback for every line; the job goes on.
    logging.raiseExceptions = False


def _format_value(value: Any) -> str:
    """Format a field's value: text, in quotes where it has spaces or is empty; other types as JSON."""
    if isinstance(value, str):
        text = _escape(_shorten(value))
        return text if text and " " not in text else f'"{text}"'
    text = json.dumps(value, default=str, ensure_ascii=False)
    return _escape(_shorten(text))


def _escape(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _shorten(value: Any, max_chars: int = MAX_VALUE_CHARS) -> Any:
    """Truncate text and redact it: third parties log whole requests."""
    if not isinstance(value, str):
        return value
    shown = redacted(value)
    return shown if len(shown) <= max_chars else shown[:max_chars] + "…"
