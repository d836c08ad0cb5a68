"""The fields of the status, what it leaves out, and how it is served."""

import itertools
import json
import random
import time
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pytest
import requests
from PIL import Image

from clients.storage.location import ObjectRef
from inference.request import EngineLoad, ModelLoad, Stage
from tests.support.paths import ROOT
from tests.support.status_pages import served, status
from watermark.signature import SignatureStyle, SignedImage, Unsigned, sign
from worker.amqp.delivery import Delivery
from worker.errors import ErrorCode
from worker.jobs.history import MAX_ENDED, History, public_message
from worker.jobs.runs import DenoiseProgress, Phase, Run
from worker.messages.decoder import decode
from worker.messages.job import JobRejected
from worker.messages.rules import JobRules
from worker.metrics import Metrics
from worker.monitoring.assets import NAMES
from worker.monitoring.idle import IdleTimer
from worker.monitoring.status import job_status, strip_details
from worker.monitoring.status_builder import MetricsSnapshot, StatusBuilder
from worker.outcome import Outcome
from worker.progress.previews import Previewer, ShownPreview

TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"
PROMPT = "a heron at dawn"
RULES = JobRules(None, None, locate=lambda text: ObjectRef("media", text))
THUMBNAIL = b"a JPEG of a finished image"


def message(**fields: Any) -> bytes:
    return json.dumps({"task_id": TASK_ID, "data": {"generation_id": 2**63 - 1, "prompt": PROMPT} | fields}).encode()


def delivered(body: bytes) -> Delivery:
    return Delivery(body, "image_generation", False, 1, 0, 0.0, session=1, tag=1, channel_number=1)


def run_of(**fields: Any) -> Run:
    body = message(**fields)
    return Run(TASK_ID, 2**63 - 1, decode(body, RULES), [delivered(body)], started_monotonic=100.0)


def rejection_of(**fields: Any) -> JobRejected:
    with pytest.raises(JobRejected) as caught:
        decode(message(**fields), RULES)
    return caught.value


def builder(**parts: Any) -> StatusBuilder:
    """Build a status builder that has these parts alone."""
    return StatusBuilder(**dict.fromkeys((field.name for field in fields(StatusBuilder)), None) | parts)  # type: ignore[arg-type]


# --- A job at work


def test_a_job_at_work_is_shown_with_its_steps_its_adapters_and_its_time_but_not_its_prompt() -> None:
    run = run_of(lora_path="models/style.safetensors", num_images=2)
    run.phase, run.progress = Phase.DENOISE, DenoiseProgress(12, 30, 4.44)

    shown = job_status(run, 107.5, shows_prompts=False, preview=None)

    assert (shown.phase, shown.step_index, shown.num_steps, shown.seconds_left) == ("denoise", 12, 30, 4.4)
    assert (shown.seconds, shown.num_images, shown.adapters) == (7.5, 2, ("models/style.safetensors",))
    assert shown.prompt is None
    assert job_status(run, 107.5, shows_prompts=True, preview=None).prompt == PROMPT


def test_preview_is_shown_only_where_prompts_are() -> None:
    preview = ShownPreview(12, b"a JPEG")
    run = run_of()

    assert job_status(run, 107.5, shows_prompts=False, preview=preview).preview is None
    shown = job_status(run, 107.5, shows_prompts=True, preview=preview)
    assert shown.preview == f"status/preview/{TASK_ID}.jpg?step=12"


@pytest.mark.parametrize(("shows_prompts", "found"), [(True, b"a JPEG"), (False, None)])
def test_status_builder_serves_previews_only_where_prompts_are_shown(
    *, shows_prompts: bool, found: bytes | None
) -> None:
    previewer = Previewer(storage=None, bucket="results")  # type: ignore[arg-type]
    previewer.follow(TASK_ID, 456).shown = ShownPreview(12, b"a JPEG")
    board = builder(previewer=previewer, shows_prompts=shows_prompts)

    assert board.read_image(f"status/preview/{TASK_ID}.jpg") == found
    assert board.read_image("status/preview/another.jpg") is None
    assert board.read_image(f"status/preview/{TASK_ID}") is None


def test_a_generation_id_that_javascript_would_round_is_text() -> None:
    assert job_status(run_of(), 101.0, shows_prompts=False, preview=None).generation_id == "9223372036854775807"


def test_a_message_that_was_rejected_has_a_row_too() -> None:
    rejected = rejection_of(prompt="")
    run = Run(TASK_ID, 456, rejected, [delivered(b"")], started_monotonic=100.0)

    shown = job_status(run, 101.0, shows_prompts=True, preview=None)

    assert (shown.adapters, shown.num_images, shown.num_steps, shown.prompt) == ((), 0, 0, None)


# --- The last jobs


def test_history_lists_the_newest_first_and_forgets_the_oldest() -> None:
    history = History(shows_prompts=False, clock=lambda: 1000.0)

    for number in range(MAX_ENDED + 5):
        run = run_of()
        run.task_id = str(number)
        history.add(run, Outcome.COMPLETE, code="", message="")

    assert [one.task_id for one in history.newest_first()] == [str(n) for n in range(MAX_ENDED + 4, 4, -1)]


def test_an_ended_job_keeps_its_outcome_and_the_seconds_of_each_stage() -> None:
    history = History(shows_prompts=False, clock=lambda: 1000.0)
    run = run_of(num_inference_steps=20)
    run.started_monotonic = time.monotonic() - 8.7
    run.stages += [Stage("ledger", 100.0, 0.25), Stage("fetch", 100.25, 1.5)]

    history.add(run, Outcome.FAILED, code="LORA_NOT_FOUND", message="the adapter s3://media/models/x does not exist")

    (one,) = history.newest_first()
    assert (one.outcome, one.code, one.finished_at) == ("failed", "LORA_NOT_FOUND", 1000.0)
    assert one.seconds == pytest.approx(8.7, abs=0.5)
    assert one.message == "the adapter s3://media/models/x does not exist"
    assert [(stage.name, stage.seconds) for stage in one.stages] == [("ledger", 0.25), ("fetch", 1.5)]
    assert (one.num_steps, one.num_images, one.attempt) == (20, 1, 1)


def test_a_prompt_enters_the_history_only_by_the_setting() -> None:
    quiet, open_hearted = History(shows_prompts=False), History(shows_prompts=True)

    for history in (quiet, open_hearted):
        history.add(run_of(), Outcome.COMPLETE, code="", message="")

    assert PROMPT not in repr(quiet.newest_first())
    assert open_hearted.newest_first()[0].prompt == PROMPT


def test_addresses_and_thumbnails_enter_the_history_only_by_the_setting() -> None:
    quiet, open_hearted = History(shows_prompts=False), History(shows_prompts=True)
    url = "https://media.example.com/generations/gen-1.png?X-Amz-Signature=secret"
    run = run_of()
    run.thumbnail = THUMBNAIL

    for history in (quiet, open_hearted):
        history.add(run, Outcome.COMPLETE, code="", message="", result_urls=(url,))

    (hidden,), (shown,) = quiet.newest_first(), open_hearted.newest_first()
    assert (hidden.result_urls, hidden.thumbnail, quiet.thumbnail(TASK_ID)) == ((), None, None)
    assert (shown.result_urls, shown.thumbnail) == ((url,), f"status/thumbnail/{TASK_ID}.jpg")
    assert open_hearted.thumbnail(TASK_ID) == THUMBNAIL
    assert builder(history=open_hearted, shows_prompts=True).read_image(str(shown.thumbnail)) == THUMBNAIL
    assert builder(history=open_hearted, shows_prompts=True).read_image("status/thumbnail/another.jpg") is None
    assert builder(history=open_hearted, shows_prompts=False).read_image(str(shown.thumbnail)) is None


@pytest.mark.parametrize("outcome", sorted(set(Outcome) - {Outcome.COMPLETE}))
def test_image_of_a_job_that_did_not_complete_is_not_shown(outcome: Outcome) -> None:
    history = History(shows_prompts=True)
    run = run_of()
    run.thumbnail = THUMBNAIL  # finished, and then not stored

    history.add(run, outcome, code="STORAGE_UNAVAILABLE", message="")

    assert (history.newest_first()[0].thumbnail, history.thumbnail(TASK_ID)) == (None, None)


def test_thumbnail_of_an_end_without_one_is_that_of_the_run_that_drew_it() -> None:
    history = History(shows_prompts=True)
    drawn = run_of()
    drawn.thumbnail = THUMBNAIL

    for run in (drawn, run_of()):  # delivered again: the end is read from the ledger
        history.add(run, Outcome.COMPLETE, code="", message="")

    assert [one.thumbnail is None for one in history.newest_first()] == [True, False]
    assert history.thumbnail(TASK_ID) == THUMBNAIL


def test_thumbnails_are_forgotten_with_their_jobs() -> None:
    history = History(shows_prompts=True)

    for number in range(MAX_ENDED + 1):
        run = run_of()
        run.task_id, run.thumbnail = str(number), THUMBNAIL
        history.add(run, Outcome.COMPLETE, code="", message="")

    assert history.thumbnail("0") is None
    assert history.thumbnail("1") == THUMBNAIL


@pytest.mark.parametrize(
    ("size", "shown"), [((128, 128), (96, 96)), ((1024, 512), (96, 48)), ((8, 1024), (1, 96)), ((40, 20), (40, 20))]
)
def test_thumbnail_is_a_small_jpeg_of_the_image_s_shape(size: tuple[int, int], shown: tuple[int, int]) -> None:
    thumbnail = Image.open(BytesIO(signed(Image.new("RGB", size, "teal")).encode_thumbnail(96)))

    assert (thumbnail.format, thumbnail.size) == ("JPEG", shown)
    assert thumbnail.getpixel((0, 0)) == pytest.approx((0, 128, 128), abs=3)


def test_thumbnail_of_noise_is_still_small() -> None:
    noise = Image.frombytes("RGB", (96, 96), random.Random(7).randbytes(3 * 96 * 96))

    assert len(signed(noise).encode_thumbnail(96)) < 10_000


def signed(image: Image.Image) -> SignedImage:
    return sign(image, Unsigned(), SignatureStyle())


def test_history_feeds_the_last_hour() -> None:
    history = History(shows_prompts=False)

    history.add(run_of(), Outcome.COMPLETE, code="", message="")
    history.add(run_of(), Outcome.FAILED, code="GPU_OOM", message="")

    hour = history.last_hour.summary()
    assert (sum(hour.complete), sum(hour.failed), hour.waited_p50) == (1, 1, None)


@pytest.mark.parametrize(
    ("created_at", "waited"),
    [
        ("2025-01-20T11:30:00Z", 12.5),
        ("2025-01-20T12:30:00+01:00", 12.5),
        ("2025-01-20T11:30:00", None),
        ("2025-01-20T11:31:00Z", 0.0),
        (None, None),
    ],
)
def test_job_has_waited_from_its_creation_to_its_delivery(created_at: str | None, waited: float | None) -> None:
    body = json.dumps(json.loads(message()) | {"created_at": created_at}).encode()
    run = Run(TASK_ID, 456, decode(body, RULES), [delivered(body)])
    run.started_unix = datetime(2025, 1, 20, 11, 30, 12, 500_000, UTC).timestamp()

    assert run.waited_seconds == waited


def test_message_of_pika_about_a_released_job_is_not_a_code() -> None:
    history = History(shows_prompts=True)

    history.add(run_of(), Outcome.RELEASED, code="StreamLostError: connection to worker@10.0.0.7 lost", message="")

    assert (history.newest_first()[0].outcome, history.newest_first()[0].code) == ("released", "")


# --- Errors that quote


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_prompt": "heron " * 1000},
        {"prompt_tags": ["heron " * 100]},
        {"artist_name": "heron " * 100},
        {"aspect_ratio": "a heron's"},
        {"lora_path": "heron " * 400},
        {"negative_prompt": 'a "heron" \\\' ' * 1000, "prompt_tags": ["the heron's" * 100]},
    ],
)
def test_an_error_that_quotes_the_message_ends_before_the_quotation(fields: dict[str, Any]) -> None:
    rejected = rejection_of(**fields)
    assert "heron" in str(rejected)

    shown = public_message(rejected.code, str(rejected), may_quote=False)

    assert "heron" not in shown
    assert shown.endswith("…")
    assert len(shown) > 10
    assert "heron" in public_message(rejected.code, str(rejected), may_quote=True)


@pytest.mark.parametrize(
    ("code", "text", "shown"),
    [
        (
            "STORAGE_UNAVAILABLE",
            "the object store failed 5 times: s3://media/generations/gen-7.png: 503",
            "the object store failed 5 times",
        ),
        ("ENGINE_ERROR", "the engine failed 5 times: ValueError: a heron at dawn", "the engine failed 5 times"),
    ],
)
def test_library_messages_stay_in_the_log_whatever_the_setting(code: str, text: str, shown: str) -> None:
    assert public_message(code, text, may_quote=False) == public_message(code, text, may_quote=True) == shown


def test_an_error_in_our_own_words_is_shown_whole() -> None:
    text = "a picture of 2048x2048 does not fit the GPU's memory, even alone: ask for a smaller one"

    assert public_message("GPU_OOM", text, may_quote=False) == text


def test_not_ready_reason_leaves_out_the_refused_object() -> None:
    assert strip_details("the store refuses this worker: s3://media/generations/gen-7.png: AccessDenied") == (
        "the store refuses this worker"
    )


# --- Where the numbers come from


def test_snapshot_equals_the_exported_metrics() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.count_job(Outcome.COMPLETE)
    for code in (ErrorCode.GPU_OOM, ErrorCode.JOB_TIMEOUT):
        metrics.count_job(Outcome.FAILED, code)
    for num_batched in (4, 2):
        metrics.note_engine_load(EngineLoad(num_batched, 3, slots_active=2, slots_idle=1, slots_free=5))

    readings = MetricsSnapshot.of(metrics.registry)

    assert readings.by_label("jobs_total") == dict.fromkeys(Outcome, 0.0) | {"complete": 3.0, "failed": 2.0}
    assert (readings.value("denoise_steps_total"), readings.value("denoise_lane_steps_total")) == (2.0, 6.0)
    assert readings.by_label("adapter_slots") == {"active": 2.0, "idle": 1.0, "free": 5.0}
    assert readings.value("queue_messages", "nowhere") == 0.0
    assert 2.0 < metrics.recent_batch < 4.0


def test_several_models_have_gauges_of_their_own_and_switches_are_counted_once() -> None:
    metrics = Metrics()
    photo = ModelLoad("photo", is_on_device=True, num_waiting=2, num_lanes=3, slots_active=1, slots_idle=4)
    default = ModelLoad("default", is_on_device=False, num_waiting=5, num_lanes=0, slots_active=0, slots_idle=0)
    load = EngineLoad(3, 3, slots_active=1, slots_idle=4, slots_free=3, models=(default, photo))

    metrics.note_engine_load(replace(load, num_batched=0, switching_to="photo"))
    assert metrics.switching_to == "photo"
    metrics.note_engine_load(load)

    assert metrics.switching_to == ""
    readings = MetricsSnapshot.of(metrics.registry)
    assert readings.by_label("model_on_device") == {"default": 0.0, "photo": 1.0}
    assert readings.by_label("model_waiting") == {"default": 5.0, "photo": 2.0}
    assert readings.by_label("model_lanes") == {"default": 0.0, "photo": 3.0}
    assert readings.by_label("model_adapter_slots") == {"default": 0.0, "photo": 5.0}
    assert readings.by_label("model_switches_total") == {"photo": 1.0}
    metrics.note_engine_load(load.emptied)
    assert MetricsSnapshot.of(metrics.registry).by_label("model_lanes") == {"default": 0.0, "photo": 0.0}


def test_the_recent_batch_follows_what_the_mean_has_long_averaged_away() -> None:
    seconds = itertools.count(step=0.1)
    metrics = Metrics(clock=lambda: next(seconds))

    for num_batched in [1] * 1000 + [8] * 500:
        metrics.note_engine_load(EngineLoad(num_batched, num_batched, slots_active=0, slots_idle=0, slots_free=0))

    assert 7.9 < metrics.recent_batch <= 8


def test_the_recent_batch_of_a_slow_device_is_that_of_its_last_forwards() -> None:
    seconds = itertools.count(step=20.0)
    metrics = Metrics(clock=lambda: next(seconds))

    for num_batched in [1] * 100 + [8] * 2:
        metrics.note_engine_load(EngineLoad(num_batched, num_batched, slots_active=0, slots_idle=0, slots_free=0))

    assert 7.8 < metrics.recent_batch <= 8


def test_recent_batch_is_absent_without_recent_denoising_and_present_during_a_long_forward() -> None:
    now = 1000.0
    metrics = Metrics(clock=lambda: now)
    assert metrics.recent_batch == 0
    metrics.note_engine_load(EngineLoad(4, 4, slots_active=0, slots_idle=0, slots_free=0))

    now += 300.0
    assert metrics.recent_batch == 4

    metrics.note_engine_load(EngineLoad(0, 0, slots_active=0, slots_idle=0, slots_free=0))
    assert metrics.recent_batch == 0


def test_idle_timer_has_the_current_reason_and_the_denoised_seconds() -> None:
    times = iter([0.0, 2.0, 5.0, 9.0])
    watch = IdleTimer(Metrics(), clock=lambda: next(times))
    assert watch.reason == "engine_starting"

    for reason in ("no_jobs", None, None):
        watch.tick(reason)

    assert (watch.reason, watch.denoising_seconds) == (None, 7.0)


# --- Over HTTP


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    made = status()
    with served(lambda: made) as address:
        yield address


def test_the_status_is_json_with_every_part(url: str) -> None:
    answer = requests.get(f"{url}status.json", timeout=120)

    body = answer.json()
    assert answer.headers["Content-Type"] == "application/json"
    assert set(body) == set(type(status()).__slots__)
    assert body["last_jobs"][1]["code"] == "LORA_NOT_FOUND"


@pytest.mark.parametrize("path", ["", "status.json", *(name for name, _ in NAMES.values() if name != "index.html")])
def test_page_has_a_strict_csp_and_is_never_cached(url: str, path: str) -> None:
    headers = requests.get(f"{url}{path}", timeout=120).headers

    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["index.html", "page/style.css", "%2e%2e/health.py", "static.py"])
def test_no_other_file_is_served(url: str, path: str) -> None:
    answer = requests.get(f"{url}{path}", timeout=120)

    assert answer.status_code == 404
    assert "/status.json" in answer.text


def test_every_file_of_the_page_is_served_and_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert {name for name, _ in NAMES.values()} == {
        path.name for path in (ROOT / "worker" / "monitoring" / "page").iterdir()
    }
    assert project["tool"]["setuptools"]["package-data"]["worker.monitoring"] == ["page/*"]
