"""One event is one line of JSON, whatever is in it."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from config.backend import BackendSettings
from config.logs import MAX_LINE_BYTES, MAX_WAITING_LINES, JsonFormatter, TextFormatter, bind, log_event


class LogCapture:
    """A logger of its own and what it has written."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.logger = logging.Logger("test.logs")  # unregistered: pytest's handlers stay out
        handler = logging.StreamHandler(self.stream)
        handler.setFormatter(JsonFormatter())
        self.logger.addHandler(handler)

    @property
    def raw(self) -> list[str]:
        return self.stream.getvalue().split("\n")[:-1]

    @property
    def only(self) -> dict[str, Any]:
        (line,) = self.raw
        parsed: dict[str, Any] = json.loads(line)
        return parsed


@pytest.fixture
def lines() -> Iterator[LogCapture]:
    kept = logging.raiseExceptions
    logging.raiseExceptions = True
    yield LogCapture()
    logging.raiseExceptions = kept


def log_failure(lines: LogCapture, text: str) -> None:
    def fail() -> None:
        raise ValueError(text)

    try:
        fail()
    except ValueError:
        lines.logger.exception("it broke")


def test_an_event_is_one_line_with_its_time_level_logger_and_fields(lines: LogCapture) -> None:
    log_event(lines.logger, "job in", attempt=2, queue="image_generation")

    line = lines.only

    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "test.logs",
        "event": "job in",
        "attempt": 2,
        "queue": "image_generation",
    }


HOSTILE = [
    '\r\n{"level": "CRITICAL", "event": "fake"}',
    "\n[CRITICAL] fake",
    "\x1b[2J\x1b[31mred",
    "\x00\x08\x7f\x85",
    "\u2028\u2029",
    "\u202egnp.exe",
    "\ud800",
    '", "level": "CRITICAL',
]


@pytest.mark.parametrize("value", HOSTILE)
def test_values_can_forge_no_line_and_reach_no_terminal(lines: LogCapture, value: str) -> None:
    with bind(task_id=value):
        log_event(lines.logger, value, prompt=value, nested={value: [value]})

    (line,) = lines.raw
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line) == lines.only
    assert lines.only["level"] == "INFO"
    assert lines.only["prompt"] == lines.only["event"] == lines.only["task_id"] == value


@pytest.mark.parametrize("value", HOSTILE)
def test_no_exception_text_can_forge_a_line(lines: LogCapture, value: str) -> None:
    log_failure(lines, value)

    (line,) = lines.raw
    assert line.isascii()
    assert line.isprintable()
    assert lines.only["level"] == "ERROR"
    assert "ValueError" in lines.only["exception"]


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("short", {"prompt": "x" * 100_000}),
        ("short", {f"field_{number}": "x" * 2000 for number in range(20)}),
        ("short", {"prompt": "한" * 100_000}),
        ("short", {"nested": ["x" * 100_000]}),
        ("short", {"nested": {"x" * 100_000: 1}}),
        ("short", {"x" * 100_000: 1}),
        ("x" * 100_000, {}),
        ("한" * 100_000, {}),
        ("🎨" * 100_000, {}),
        ("\x1b" * 100_000, {"prompt": "\x1b" * 100_000}),
    ],
    ids=["ascii", "many", "hangul", "list", "dict", "name", "event", "hangul-event", "astral-event", "escape-event"],
)
def test_line_has_at_most_eight_kilobytes_and_keeps_its_event(
    lines: LogCapture, event: str, fields: dict[str, Any]
) -> None:
    log_event(lines.logger, event, **fields)

    (line,) = lines.raw
    assert len(line.encode()) <= MAX_LINE_BYTES
    assert lines.only["event"][:100] == event[:100]
    assert lines.only["level"] == "INFO"


def test_a_long_exception_keeps_its_end_which_names_the_error(lines: LogCapture) -> None:
    log_failure(lines, "x" * 100_000 + " at the end")

    assert len(lines.raw[0]) <= MAX_LINE_BYTES
    assert lines.only["exception"].endswith("at the end")


def test_a_line_that_was_cut_still_names_its_job(lines: LogCapture) -> None:
    with bind(task_id="660f9511", generation_id=456):
        log_event(lines.logger, "job out", nested=["x" * 100_000])

    assert lines.only["task_id"] == "660f9511"
    assert lines.only["generation_id"] == 456


def test_values_that_are_not_json_are_written_as_text(lines: LogCapture) -> None:
    log_event(lines.logger, "odd", error=ValueError("why"), names={"a"})

    assert lines.only["error"] == "why"
    assert lines.only["names"] == "{'a'}"


def test_bound_fields_are_on_every_line_of_the_block_and_only_there(lines: LogCapture) -> None:
    with bind(task_id="t"):
        with bind(generation_id=1):
            log_event(lines.logger, "inner")
        log_event(lines.logger, "outer")
    log_event(lines.logger, "after")

    inner, outer, after = (json.loads(line) for line in lines.raw)
    assert (inner["task_id"], inner["generation_id"]) == ("t", 1)
    assert outer["task_id"] == "t"
    assert "generation_id" not in outer
    assert "task_id" not in after


def test_bound_fields_end_with_their_block_when_it_raises(lines: LogCapture) -> None:
    with pytest.raises(KeyError), bind(task_id="t"):
        raise KeyError
    log_event(lines.logger, "after")

    assert "task_id" not in lines.only


def test_bound_fields_are_the_thread_s_own(lines: LogCapture) -> None:
    with bind(task_id="t"):
        other = threading.Thread(target=log_event, args=(lines.logger, "elsewhere"))
        other.start()
        other.join()

    assert "task_id" not in lines.only


def test_an_event_s_own_fields_win_over_the_bound_ones(lines: LogCapture) -> None:
    with bind(task_id="bound"):
        log_event(lines.logger, "event", task_id="own")

    assert lines.only["task_id"] == "own"


def test_logged_settings_show_no_secret(lines: LogCapture) -> None:
    settings = BackendSettings(
        BACKEND_API_URL="https://backend.example",  # type: ignore[call-arg]
        INTERNAL_API_TOKEN="canary-token",
        WEBHOOK_SIGNING_SECRET="canary-secret",
    )

    log_event(lines.logger, "settings", settings=settings, token=settings.token, dumped=settings.model_dump())
    lines.logger.warning("with %s and %r", settings.token, settings.signing_secret)

    assert settings.token.get_secret_value() == "canary-token"  # it is there
    assert "canary" not in lines.stream.getvalue()


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


class Terminal:
    """A pseudo-terminal; what a program writes to `slave` is read back."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()

    def text(self) -> str:
        os.close(self.slave)
        found = b""
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(self.master, 65536):
                found += chunk
        os.close(self.master)
        return found.decode()


LOG_ONE = """
import logging
from config.logs import configure_logging, log_event
configure_logging("INFO", "{}")
log_event(logging.getLogger("ours"), "job out", seconds=1.5, note="two words", stages={{"denoise": 1.0}})
logging.getLogger().handlers[0].flush(); logging.getLogger().handlers[-1].flush()
"""
TEXT_LINE = r'\d\d:\d\d:\d\d job out  seconds=1\.5 note="two words" stages=\{"denoise": 1\.0\}'


@pytest.mark.parametrize(
    ("log_format", "out_is_terminal", "err_is_terminal", "has_json", "has_text"),
    [
        ("auto", False, False, True, False),
        ("auto", True, True, False, True),
        # What is piped on is for a program, whoever looks on.
        ("auto", False, True, True, True),
        ("auto", True, False, True, False),
        ("json", True, True, True, False),
        ("text", False, False, False, True),
    ],
)
def test_logs_are_text_on_standard_error_for_terminals_and_json_on_standard_output(
    *, log_format: str, out_is_terminal: bool, err_is_terminal: bool, has_json: bool, has_text: bool, tmp_path: Path
) -> None:
    terminals = {"out": Terminal() if out_is_terminal else None, "err": Terminal() if err_is_terminal else None}
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        subprocess.run(
            [sys.executable, "-c", LOG_ONE.format(log_format)],
            stdout=terminals["out"].slave if terminals["out"] else out,
            stderr=terminals["err"].slave if terminals["err"] else err,
            timeout=120,
            check=True,
        )
    printed = {
        name: terminal.text() if terminal else (tmp_path / name).read_text() for name, terminal in terminals.items()
    }

    assert [json.loads(line)["event"] for line in printed["out"].splitlines()] == (["job out"] if has_json else [])
    assert bool(re.fullmatch(TEXT_LINE, printed["err"].strip())) == has_text
    assert has_text or printed["err"] == ""


@pytest.mark.parametrize("value", HOSTILE)
def test_control_characters_in_values_are_escaped_for_the_terminal(lines: LogCapture, value: str) -> None:
    lines.logger.handlers[0].setFormatter(TextFormatter())

    with bind(task_id=value):
        log_event(lines.logger, value, logging.WARNING, prompt=value, nested={value: [value]})
    log_failure(lines, value)

    assert all(line.isprintable() for line in lines.raw)
    first, second, *trace = lines.raw
    assert " WARNING " in first
    assert second.endswith(" ERROR it broke")
    assert all(line.startswith("    ") for line in trace)
    lines.stream.getvalue().encode()


def test_text_is_cut_as_json_is_and_shows_no_secret_of_a_url() -> None:
    record = logging.makeLogRecord({"msg": "한" * 100_000, "fields": {"url": "amqp://worker:canary@host/"}})
    short = logging.makeLogRecord({"msg": "x", "fields": {"url": "amqp://worker:canary@host/"}})

    assert len(TextFormatter().format(record).encode()) <= MAX_LINE_BYTES
    assert "canary" not in TextFormatter().format(short)
    assert "host" in TextFormatter().format(short)


def test_third_party_loggers_log_from_warning_on_and_pika_not_at_all() -> None:
    ended = python(
        "import logging; from config.logs import configure_logging; configure_logging('DEBUG')\n"
        "for name in ('pika.adapters', 'urllib3', 'botocore.auth', 'httpx', 'ours'):\n"
        "    logging.getLogger(name).info('amqp://user:password@host'); logging.getLogger(name).warning('heard')\n"
    )

    written = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [line["logger"] for line in written if line["level"] == "INFO"] == ["ours"]
    heard = [line["logger"] for line in written if line["event"] == "heard"]
    assert heard == ["urllib3", "botocore.auth", "httpx", "ours"]


def test_a_closed_standard_output_does_not_end_the_job() -> None:
    ended = python(
        "import logging, os, sys; from config.logs import configure_logging; configure_logging('INFO')\n"
        "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(writer); os.close(reader)\n"
        "logging.getLogger('ours').info('lost')\n"
        "print('the job went on', end='', file=sys.stderr, flush=True); os._exit(0)\n"
    )

    assert (ended.returncode, ended.stderr) == (0, "the job went on")


LOG_MUCH = """
import logging, sys
from config.logs import MAX_WAITING_LINES, configure_logging, log_event
configure_logging("INFO")
logger = logging.getLogger("test")
for number in range(MAX_WAITING_LINES * 2):
    log_event(logger, "step", number=number, padding="x" * 100)
print("went on", file=sys.stderr, flush=True)
sys.stdin.readline()
logging.getLogger().handlers[0].flush()  # until there is room again: the last would be dropped too
log_event(logger, "the last")
"""


def test_full_pipe_blocks_nothing_and_dropped_lines_are_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOG_MUCH],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        # The pipe holds some hundred lines: without a thread of its own the process would stand still here.
        assert process.stderr.readline() == "went on\n"
        printed, _ = process.communicate("\n", timeout=120)

    parsed = [json.loads(line) for line in printed.splitlines()]
    dropped = sum(line["count"] for line in parsed if line["event"] == "log lines dropped")
    steps = [line["number"] for line in parsed if line["event"] == "step"]
    assert dropped > 0
    assert len(steps) + dropped == 2 * MAX_WAITING_LINES
    assert steps == sorted(steps)
    assert parsed[-1]["event"] == "the last"
