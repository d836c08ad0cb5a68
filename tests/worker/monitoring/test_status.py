"""The fields of the status, what it leaves out, and the page that shows it in a real Chromium."""

import itertools
import json
import re
import time
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, expect

from clients.storage.location import ObjectRef
from inference.request import EngineLoad, Stage
from tests.support.browsing import PHONE, PageSession, chromium
from tests.support.paths import ROOT
from tests.support.status_pages import ended, failed, job, served, status
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
from worker.monitoring.status import (
    BatchStatus,
    IdleStatus,
    SlotsStatus,
    WorkerStatus,
    job_status,
    strip_details,
)
from worker.monitoring.status_builder import MetricsSnapshot, StatusBuilder
from worker.outcome import Outcome
from worker.progress.previews import Previewer, ShownPreview

TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"
PROMPT = "a heron at dawn"
RULES = JobRules(None, None, locate=lambda text: ObjectRef("media", text))
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


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
    parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(StatusBuilder))
    board = StatusBuilder(**parts | {"previewer": previewer, "shows_prompts": shows_prompts})

    assert board.read_preview(TASK_ID) == found
    assert board.read_preview("another") is None


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


# --- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_the_page_shows_the_worker_without_a_complaint_or_a_foreign_request(browser: Browser, url: str) -> None:
    with PageSession(browser) as visit:
        visit.page.goto(url)

        expect(visit.page.locator("#state")).to_have_text("ready")
        expect(visit.page.locator("#lanes")).to_have_text("5 of 10")
        expect(visit.page.locator("#idle-answer")).to_have_text("It is not: 5 lanes are being denoised.")
        expect(visit.page.locator("#jobs > li")).to_have_count(6)
        bar = visit.page.get_by_role("progressbar", name="Job 48213")
        expect(bar).to_have_attribute("aria-valuenow", "40")
        expect(visit.page.get_by_role("img", name="5 in use, 7 loaded, 4 free")).to_be_visible()
        expect(visit.page.get_by_role("row", name="image_generation.dead 1")).to_be_visible()
        assert visit.complaints == []
        assert visit.origins == {url}


def test_an_ended_job_opens_to_its_error_and_its_stages_and_stays_open(browser: Browser, url: str) -> None:
    with PageSession(browser) as visit:
        visit.page.goto(url)
        row = visit.page.locator("#last > li").nth(1)
        expect(row.locator(".message")).to_have_count(0)

        row.locator("summary").click()

        expect(row.locator(".code")).to_have_text("LORA_NOT_FOUND")
        expect(row.locator(".message")).to_have_text(re.compile("does not exist"))
        expect(row.locator(".stages li")).to_have_text(["ledger14 ms", "fetch2.20 s", "record20 ms", "notify30 ms"])
        with visit.page.expect_response("**/status.json"):
            pass
        with visit.page.expect_response("**/status.json"):
            pass
        expect(row.locator(".message")).to_be_visible()


@pytest.mark.parametrize("width", [320, 360, 620, 621, 1000, 1001, 1280])
def test_the_page_never_scrolls_sideways(browser: Browser, width: int, tmp_path: Path) -> None:
    worst = status(
        worker=WorkerStatus(
            "a-host-of-a-very-long-name-in-some-cluster-7f6c9d8b5-x2x2x:17", "0.1.0", 0.0, 1e7, "y" * 80
        ),
        batch=BatchStatus(256, 256, 10**9, 255.99, 255.99),
        slots=SlotsStatus(1000, 20, 4),
        jobs=(job(1, generation_id=str(2**63 - 1), adapters=("x" * 300,) * 4, prompt="y" * 4000),),
        last_jobs=(replace(failed(1, "E" * 60, "z" * 500), generation_id=str(2**63 - 1), seconds=99999.0),),
    )
    with served(lambda: worst) as address, PageSession(browser, viewport=PHONE | {"width": width}) as visit:
        visit.page.goto(address)
        visit.page.locator("#last summary").click()

        expect(visit.page.locator("#last .message")).to_be_visible()
        visit.page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        assert not visit.scrolls_sideways()


def test_hostile_text_is_shown_as_text_and_does_not_run(browser: Browser) -> None:
    hostile = status(
        worker=WorkerStatus(HOSTILE, HOSTILE, 0.0, 1.0, HOSTILE),
        jobs=(job(1, adapters=(HOSTILE,), phase=HOSTILE, prompt=HOSTILE, generation_id=HOSTILE),),
        last_jobs=(replace(failed(1, HOSTILE, HOSTILE), outcome=HOSTILE, prompt=HOSTILE, generation_id=HOSTILE),),
        idle=replace(status().idle, reason=HOSTILE),
    )
    with served(lambda: hostile) as address, PageSession(browser) as visit:
        visit.page.goto(address)
        visit.page.locator("#last summary").click()

        expect(visit.page.locator("#last .message")).to_have_text(HOSTILE)
        expect(visit.page.locator("#jobs .prompt")).to_have_text(HOSTILE)
        assert visit.page.locator("main script, main img").count() == 0
        assert visit.page.title() == "Not ready · Darkroom"
        assert visit.complaints == []
        assert visit.origins == {address}


CONTRASTS = """() => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => rgb.map((c) => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(one).backgroundColor);
      if (alpha > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility()) continue;
    const [light, dark] = [luminance(parse(getComputedStyle(node).color).slice(0, 3)), luminance(ground(node))]
      .sort((a, b) => b - a);
    found.push([(light + 0.05) / (dark + 0.05), `${node.className || node.tagName}: ${node.textContent.slice(0, 40)}`]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(browser: Browser, url: str, scheme: str, tmp_path: Path) -> None:
    with PageSession(browser, color_scheme=scheme) as visit:
        visit.page.goto(url)
        visit.page.locator("#last > li").nth(1).locator("summary").click()
        expect(visit.page.locator("#last .message")).to_be_visible()

        contrasts = visit.page.evaluate(CONTRASTS)

        visit.page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
        assert len(contrasts) > 100
        assert [one for one in contrasts if one[0] < 4.5] == []


def test_page_follows_the_colour_scheme(browser: Browser, url: str) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        with PageSession(browser, color_scheme=scheme) as visit:
            visit.page.goto(url)
            colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            grounds[scheme] = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert grounds["dark"] < 40
    assert grounds["light"] > 215


def test_animations_are_off_with_reduced_motion(browser: Browser, url: str) -> None:
    moving = "[...document.querySelectorAll('*')].filter((n) => getComputedStyle(n).transitionDuration !== '0s').length"
    counts = []
    for wish in ("no-preference", "reduce"):
        with PageSession(browser, reduced_motion=wish) as visit:
            visit.page.goto(url)
            expect(visit.page.locator("#last > li")).to_have_count(14)
            counts.append(visit.page.evaluate(moving))

    assert counts[0] > 0
    assert counts[1] == 0


# What of the page a person sees or hears, by element; the age of the numbers is of the moment it is looked at.
SHOWN = """() => [...document.querySelectorAll("main, main *, header *, title")].map((node) => [
  node.tagName, node.id, node.className,
  [...node.childNodes].filter((one) => one.nodeType === 3).map((one) => one.textContent).join("|"),
  ["aria-label", "aria-valuenow", "aria-valuetext", "data-state", "data-outcome", "data-task", "style", "src"]
    .map((name) => node.getAttribute(name)),
  node.hidden,
].join(" # "))"""


def test_updated_page_equals_a_reloaded_one(browser: Browser) -> None:
    at = time.time()
    before = status(at=at)
    after = status(
        at=at + 60,
        worker=replace(before.worker, uptime_seconds=9000.0, why_not_ready="stopping"),
        model=replace(before.model, load_seconds=9.9, step_seconds=0.5, recent_step_seconds=7.7),
        jobs=tuple(
            replace(one, step_index=29, seconds=99.0, seconds_left=1.0, attempt=2, phase="denoise")
            for one in before.jobs[1:]
        ),
        batch=BatchStatus(9, 10, 99999, 9.99, 8.88),
        slots=SlotsStatus(active=9, idle=5, free=2),
        cache=replace(before.cache, size_bytes=16_000_000_000),
        gpu=replace(before.gpu, memory_used_bytes=20_000_000_000, utilization_ratio=0.11),
        queues=tuple(replace(one, num_messages=one.num_messages + 7) for one in before.queues),
        webhooks=replace(before.webhooks, num_waiting=0, failing=()),
        outcomes={"complete": 2222, "failed": 33, "cancelled": 5, "retried": 44},
        engine_restarts=6,
        idle=IdleStatus(
            "decoding", 100.0, {"no_jobs": 200.0, "decoding": 300.0, "broker_down": 400.0, "refused": 500.0}
        ),
        last_jobs=(ended(20, finished_at=at), *before.last_jobs),
    )
    seen = [before]
    with served(lambda: seen[-1]) as address, PageSession(browser) as updated, PageSession(browser) as fresh:
        updated.page.goto(address)
        expect(updated.page.locator("#done")).to_have_text("1,284")

        seen.append(after)

        for visit in (updated, fresh):
            if visit is fresh:
                visit.page.goto(address)
            expect(visit.page.locator("#done")).to_have_text("2,222")
        shown = fresh.page.evaluate(SHOWN)
        assert len(shown) > 200
        assert updated.page.evaluate(SHOWN) == shown
        expect(updated.page.locator("#idle-legend li").first).to_have_text("denoising 6.7 %1 min 40 s")


def test_numbers_that_change_move_nothing(browser: Browser) -> None:
    seen = [status(batch=BatchStatus(1, 10, 11111, 1.11, 1.11), outcomes={"complete": 1111})]
    with served(lambda: seen[-1]) as address, PageSession(browser) as visit:
        visit.page.goto(address)
        expect(visit.page.locator("#done")).to_have_text("1,111")
        boxes = "[...document.querySelectorAll('.tile, section, #jobs > li')]"
        places = f"{boxes}.map((node) => node.getBoundingClientRect().toJSON())"
        before = visit.page.evaluate(places)

        moved = tuple(replace(one, step_index=one.step_index + 1, seconds=one.seconds + 1) for one in seen[0].jobs)
        batch = BatchStatus(8, 10, 88888, 8.88, 8.88)
        seen.append(replace(seen[0], jobs=moved, batch=batch, outcomes={"complete": 8888}))

        expect(visit.page.locator("#done")).to_have_text("8,888")
        assert visit.page.evaluate(places) == before


def test_lost_worker_is_shown_with_the_age_of_the_numbers(browser: Browser, url: str) -> None:
    with PageSession(browser) as visit:
        visit.page.clock.install()
        visit.page.goto(url)
        expect(visit.page.locator("#state")).to_have_text("ready")
        expect(visit.page.locator("#stale")).to_be_hidden()

        visit.page.route("**/status.json", lambda route: route.abort())
        visit.page.clock.run_for(90_000)

        expect(visit.page.get_by_role("alert")).to_contain_text(
            re.compile(r"cannot be reached\. These numbers are 1 min \d+ s old")
        )
        expect(visit.page.locator("#state")).to_have_text("not reached")

        visit.page.unroute("**/status.json")
        visit.page.clock.run_for(3_000)
        expect(visit.page.locator("#stale")).to_be_hidden()
        expect(visit.page.locator("#state")).to_have_text("ready")


def test_hidden_page_sends_no_requests(browser: Browser, url: str) -> None:
    show = "(h) => { Object.defineProperty(document, 'hidden', {value: h, configurable: true}); "
    show += "document.dispatchEvent(new Event('visibilitychange')); }"
    with PageSession(browser) as visit:
        visit.page.clock.install()
        visit.page.goto(url)
        expect(visit.page.locator("#state")).to_have_text("ready")

        visit.page.evaluate(show, True)
        visit.page.clock.run_for(2_000)
        visit.page.wait_for_load_state("networkidle")
        num_before = len(visit.requested)
        visit.page.clock.run_for(60_000)
        assert len(visit.requested) == num_before

        with visit.page.expect_response("**/status.json"):
            visit.page.evaluate(show, False)
        expect(visit.page.locator("#stale")).to_be_hidden()


def test_the_newest_job_comes_first_and_the_others_keep_their_rows(browser: Browser) -> None:
    seen = [status(last_jobs=(ended(1), ended(2)))]
    with served(lambda: replace(seen[-1], at=time.time())) as address, PageSession(browser) as visit:
        visit.page.goto(address)
        expect(visit.page.locator("#last .id")).to_have_text(["#48199", "#48198"])
        visit.page.locator("#last > li").nth(1).locator("summary").click()

        seen.append(status(last_jobs=(ended(0), *seen[0].last_jobs)))

        expect(visit.page.locator("#last .id")).to_have_text(["#48200", "#48199", "#48198"])
        expect(visit.page.locator("#last > li").nth(2).locator(".stages")).to_be_visible()
