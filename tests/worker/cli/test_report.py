"""`darkroom report`: which records are read, what a row takes from one, and what is drawn of it."""

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from clients.storage.client import Storage
from clients.storage.location import ObjectRef
from clients.webhooks import WebhookKind
from config.store import StoreSettings
from tests.support.servers.clients_servers import AnsweringServer, answer, refused_url
from worker.cli.main import app
from worker.cli.report.bars import Axis, Bar, cells, legend
from worker.cli.report.rows import Row, StageInterval, row_of, summarise
from worker.cli.report.stages import STAGES, UNACCOUNTED
from worker.errors import ErrorCode
from worker.results.ledger import Entry, Ledger
from worker.results.terminal_event import TerminalEvent, failed_event

BEGAN_AT = 1_800_000_000.0
PROMPT = "a secret prompt"
STAGE_TIMES = (("ledger", 0.0, 0.5), ("fetch", 0.5, 1.5), ("denoise", 2.0, 7.0), ("store", 9.0, 1.0))
NOW = datetime(2027, 1, 15, tzinfo=UTC)


def complete(number: int, *, began_at: float = BEGAN_AT, **fields: Any) -> TerminalEvent:
    body = {"generation_id": number, "result_url": "https://a", "metadata": {"prompt_tags": [PROMPT]}}
    known = {"began_at": began_at, "stages": STAGE_TIMES, "worker": "host:1", "ended_at": began_at + 10.0}
    return TerminalEvent(str(uuid.uuid4()), number, WebhookKind.COMPLETE, body, **known | fields)


def failed(number: int, *, seconds_in_engine: float = 4.0) -> TerminalEvent:
    return failed_event(
        task_id=str(uuid.uuid4()),
        generation_id=number,
        code=ErrorCode.GPU_OOM,
        message=f"too large: {PROMPT}",
        retry_count=2,
        worker="host:2",
        began_at=BEGAN_AT,
        stages=STAGE_TIMES[:2],
        ended_at=BEGAN_AT + 2.0 + seconds_in_engine,
    )


def row(event: TerminalEvent) -> Row:
    return row_of(Entry(NOW, event.task_id), event)


# --- What a row takes from a record


def test_a_complete_job_s_row_has_its_stages_on_the_clock() -> None:
    made = row(replace(complete(7), is_delivered=True))

    assert (made.outcome, made.error_code, made.worker, made.attempt, made.is_delivered) == (
        "complete",
        "",
        "host:1",
        1,
        True,
    )
    assert made.intervals[2] == StageInterval("denoise", BEGAN_AT + 2.0, 7.0)
    assert (made.began_at, made.seconds) == (BEGAN_AT, 10.0)


def test_unaccounted_time_of_a_failed_job_is_shown_as_the_rest() -> None:
    made = row(failed(7))

    assert (made.outcome, made.error_code, made.attempt) == ("failed", "GPU_OOM", 3)
    assert made.intervals[-1] == StageInterval(UNACCOUNTED, BEGAN_AT + 2.0, 4.0)
    assert made.seconds == 6.0


def test_a_cancelled_job_is_shown_as_cancelled_and_not_as_failed() -> None:
    event = replace(failed(7), body={"generation_id": 7, "error_code": "CANCELLED"})

    made = row(event)

    assert (made.outcome, made.end, made.as_object()["outcome"]) == ("cancelled", "cancelled", "cancelled")
    assert event.kind is WebhookKind.FAILED  # as its backend is told


def test_a_record_of_an_older_worker_is_read_and_has_no_bar() -> None:
    fields = json.loads(failed(7).to_json())
    for name in ("attempt", "ended_at", "began_at"):
        del fields[name]
    fields["stages"] = []

    made = row(TerminalEvent.from_json(json.dumps(fields).encode()))

    assert made.intervals == ()
    assert (made.outcome, made.attempt, made.began_at) == ("failed", 1, NOW.timestamp())
    assert made.as_object()["seconds"] is None


def test_a_complete_record_from_before_the_end_was_noted_ends_with_its_last_stage() -> None:
    fields = json.loads(complete(7).to_json())
    del fields["ended_at"]

    assert row(TerminalEvent.from_json(json.dumps(fields).encode())).seconds == 10.0


@pytest.mark.parametrize(
    "fields",
    [
        {"began_at": "noon"},
        {"began_at": float("nan")},
        {"began_at": 1e300},
        {"began_at": -5.0},
        {"ended_at": "late"},
        {"ended_at": float("inf")},
        {"stages": (("denoise", 0.0, "long"),)},
        {"stages": (("denoise", 0.0, -1.0),)},
        {"stages": (("denoise", 0.0, 10**400),)},
    ],
)
def test_invalid_times_give_a_row_without_a_bar(fields: dict[str, Any]) -> None:
    made = row(complete(7, **fields) if "began_at" not in fields else replace(complete(7), **fields))

    assert made.intervals == ()
    assert made.outcome == "complete"


# --- The axis and the bars


def test_idle_stretches_are_cut_out_of_the_axis() -> None:
    axis = Axis([(100.0, 110.0), (105.0, 120.0), (3600.0, 3610.0)])

    assert (axis.seconds, axis.idle_seconds) == (30.0, 3480.0)
    assert [axis.place(moment) for moment in (100.0, 115.0, 120.0, 2000.0, 3600.0, 3605.0, 9999.0)] == [
        0.0,
        15.0,
        20.0,
        20.0,
        20.0,
        25.0,
        30.0,
    ]


def test_each_cell_shows_the_stage_that_takes_the_most_of_it() -> None:
    intervals = [StageInterval("fetch", 0.0, 2.6), StageInterval("denoise", 2.6, 5.4), StageInterval("store", 8.0, 2.0)]

    drawn = cells(intervals, Axis([(0.0, 10.0)]), 10)

    assert drawn == ["fetch"] * 3 + ["denoise"] * 5 + ["store"] * 2


def test_a_job_that_is_shorter_than_a_cell_has_one_all_the_same() -> None:
    axis = Axis([(0.0, 1000.0)])

    for moment in (0.0, 555.5, 999.999, 1000.0):
        assert [stage for stage in cells([StageInterval("sign", moment, 0.0)], axis, 10) if stage] == ["sign"]


def test_bar_without_time_is_empty() -> None:
    assert cells([], Axis([]), 4) == [""] * 4
    assert cells([StageInterval("sign", 5.0, 0.0)], Axis([(5.0, 5.0)]), 4) == [""] * 4


@pytest.mark.parametrize(("has_colours", "expected"), [(True, "█" * 10), (False, "lff######p")])
def test_bar_is_coloured_or_lettered_without_colours(has_colours: bool, expected: str) -> None:
    console = Console(width=10, force_terminal=has_colours, color_system="truecolor" if has_colours else None)
    intervals = [
        StageInterval("ledger", 0.0, 1.0),
        StageInterval("fetch", 1.0, 2.0),
        StageInterval("denoise", 3.0, 6.0),
    ]

    with console.capture() as captured:
        console.print(Bar([*intervals, StageInterval("store", 9.0, 1.0)], Axis([(0.0, 10.0)])))

    text = captured.get()
    assert ("\x1b[" in text) is has_colours
    for look in STAGES.values():
        text = text.replace("\x1b[38;2;{};{};{}m".format(*bytes.fromhex(look.colour[1:])), "")
    assert text.replace("\x1b[0m", "").strip() == expected


def test_legend_lists_the_stages_present_in_their_order() -> None:
    text = legend(["store", UNACCOUNTED, "fetch"], Console(color_system=None)).plain

    assert text.split() == ["f", "fetch", "p", "store", "?", "rest"]


def test_every_stage_has_a_colour_and_a_letter_of_its_own() -> None:
    assert (
        len({look.colour for look in STAGES.values()}) == len({look.letter for look in STAGES.values()}) == len(STAGES)
    )


def test_summary_has_median_p95_and_share_the_largest_first() -> None:
    def of(seconds: float) -> Row:
        return row(complete(1, stages=(("fetch", 0.0, 1.0), ("denoise", 1.0, seconds)), ended_at=0.0))

    first, second = summarise([of(float(number)) for number in range(1, 21)])

    assert (first.stage, first.num_jobs, first.median_seconds, first.p95_seconds) == ("denoise", 20, 10.5, 19.0)
    assert (second.stage, second.median_seconds) == ("fetch", 1.0)
    assert first.share == pytest.approx(210 / 230)


# --- The command, on a real store


class Operator:
    """An operator at a terminal with access to the bucket alone."""

    def __init__(self, settings: StoreSettings) -> None:
        self.storage = Storage(settings)
        self.ledger = Ledger(self.storage, settings.bucket)
        self._env = {
            str(field.validation_alias): str(value)
            for name, field in StoreSettings.model_fields.items()
            if (value := getattr(settings, name)) not in (None, ())
        }
        secret = settings.secret_access_key
        assert secret is not None
        self._env |= {"AWS_SECRET_ACCESS_KEY": secret.get_secret_value(), "COLUMNS": "120"}

    def types(self, *arguments: object) -> Result:
        """Run `darkroom report …` in this process."""
        return CliRunner().invoke(app, ["report", *map(str, arguments)], env=self._env)

    def rows(self, *arguments: object) -> list[dict[str, Any]]:
        done = self.types("--json", *arguments)
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]

    def write(self, key: str, content: bytes) -> None:
        self.storage.put(ObjectRef(self.ledger.bucket, key), content, content_type="application/json")


@pytest.fixture
def operator(store_settings: StoreSettings) -> Operator:
    return Operator(store_settings)


def test_the_last_jobs_are_drawn_in_the_order_they_began(operator: Operator) -> None:
    operator.ledger.record(complete(102, began_at=BEGAN_AT + 8.0))
    operator.ledger.mark_delivered(operator.ledger.record(complete(101)))
    operator.ledger.record(failed(103))

    done = operator.types()

    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    rows = [next(line for line in lines if f" {number} " in line) for number in (101, 102, 103)]
    assert [row.split()[2:6] for row in rows] == [
        ["10.00", "complete", "1", "yes"],
        ["10.00", "complete", "1", "no"],
        ["6.00", "GPU_OOM", "3", "no"],
    ]
    assert lines.index(rows[0]) < lines.index(rows[1])
    assert "3 jobs: 2 complete, 1 failed" in done.stdout
    assert "most of the time goes into: denoise (54%)" in done.stdout
    assert PROMPT not in done.stdout


def test_json_lines_have_the_times_and_neither_prompt_nor_message(operator: Operator) -> None:
    event = operator.ledger.record(failed(7))

    [found] = operator.rows()

    assert found.pop("recorded_at") == pytest.approx(time.time(), abs=60)
    assert found == {
        "task_id": event.task_id,
        "generation_id": 7,
        "outcome": "failed",
        "error_code": "GPU_OOM",
        "attempt": 3,
        "worker": "host:2",
        "is_delivered": False,
        "began_at": BEGAN_AT,
        "seconds": 6.0,
        "stages": [["ledger", 0.0, 0.5], ["fetch", 0.5, 1.5], ["rest", 2.0, 4.0]],
    }


def test_newest_records_are_those_written_last(operator: Operator) -> None:
    for number in (1, 2, 3):
        operator.ledger.record(complete(number))
    operator.write("jobs/a.lease", b"{}")
    operator.write(".darkroom/conditional-writes.json", b"{}")
    time.sleep(1.1)  # S3 lists times by the second
    border = datetime.now(UTC)
    time.sleep(1.1)
    new = {operator.ledger.record(complete(number)).task_id for number in (4, 5)}

    assert {entry.task_id for entry in operator.ledger.newest(2)} == new
    assert {entry.task_id for entry in operator.ledger.newest(100, since=border)} == new
    assert len(operator.ledger.newest(100)) == 5
    assert {one["generation_id"] for one in operator.rows("--last", 2)} == {4, 5}
    assert len(operator.rows("--since", "1h", "--last", 3)) == 3


def test_a_listing_of_many_pages_is_gone_through_to_its_end(operator: Operator) -> None:
    for number in range(7):
        operator.write(f"jobs/{number}.json", b"{}")

    found = list(operator.storage.list_objects(operator.ledger.bucket, "jobs/", page_keys=3))

    assert [one.key for one in found] == [f"jobs/{number}.json" for number in range(7)]
    assert all(abs(one.modified_at - datetime.now(UTC)) < timedelta(minutes=1) for one in found)


def test_empty_bucket_is_reported(operator: Operator) -> None:
    done = operator.types()

    assert (done.exit_code, "no job has ended" in done.stdout) == (0, True)
    assert operator.rows() == []


def test_unreadable_record_is_a_row_and_hides_no_other(operator: Operator) -> None:
    operator.ledger.record(complete(101))
    operator.write("jobs/broken\x1b[31m.json", b"{")

    done = operator.types()

    assert done.exit_code == 0, done.output
    assert "2 jobs: " in done.stdout
    assert "1 unreadable" in done.stdout
    assert "cannot be read: jobs/broken\\u001b[31m.json" in done.stdout
    assert {one["outcome"] for one in operator.rows()} == {"complete", "unreadable"}


def test_missing_bucket_is_reported_in_one_sentence(store_settings: StoreSettings) -> None:
    done = Operator(store_settings.model_copy(update={"bucket": "nobody-made-it"})).types()

    assert done.exit_code == 1
    assert "nobody-made-it" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("text", ["soon", "1", "1w", "-1h", "1h1h"])
def test_invalid_time_is_refused(operator: Operator, text: str) -> None:
    done = operator.types(f"--since={text}")

    assert done.exit_code == 2
    assert "--since" in done.output


# --- Ten thousand records


def page(numbers: range, *, is_last: bool) -> bytes:
    entries = "".join(
        f"<Contents><Key>jobs/{number:05}.json</Key><Size>9</Size>"
        f"<LastModified>{(NOW + timedelta(seconds=(number * 7919) % 10_000)).isoformat()}</LastModified></Contents>"
        for number in numbers
    )
    more = "" if is_last else "<NextContinuationToken>more</NextContinuationToken>"
    is_cut = str(not is_last).lower()
    return f"<ListBucketResult><IsTruncated>{is_cut}</IsTruncated>{more}{entries}</ListBucketResult>".encode()


@pytest.fixture
def crowded() -> Iterator[AnsweringServer]:
    """Serve a store with three thousand equal records."""
    pages = [page(range(first, first + 1000), is_last=first == 2000) for first in range(0, 3000, 1000)]
    record = complete(7).to_json()
    etag = hashlib.md5(record, usedforsecurity=False).hexdigest()
    with AnsweringServer([*map(page_answer, pages), answer(200, record, ETag=f'"{etag}"')]) as server:
        yield server


def page_answer(body: bytes) -> bytes:
    return answer(200, body, Content_Type="application/xml")


def test_newest_of_three_thousand_records_are_read_alone(crowded: AnsweringServer) -> None:
    settings = StoreSettings.model_validate(
        {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_STORAGE_BUCKET_NAME": "media",
            "AWS_S3_ENDPOINT_URL": crowded.url,
        }
    )

    found = Operator(settings).rows("--last", 20)

    lists, reads = crowded.requests[:3], crowded.requests[3:]
    assert all(b"list-type=2" in request for request in lists)
    assert [b"continuation-token=more" in request for request in lists] == [False, True, True]
    newest = sorted(range(3000), key=lambda number: number * 7919 % 10_000)[-20:]
    assert {one["task_id"] for one in found} == {f"{number:05}" for number in newest}
    assert len(reads) == 20


def test_store_that_is_down_is_reported_in_one_sentence(store_settings: StoreSettings) -> None:
    done = Operator(store_settings.model_copy(update={"endpoint_url": refused_url()})).types()

    assert done.exit_code == 1
    assert "cannot be reached" in done.output
