"""The status page in a real Chromium, with made-up workers: what it shows, keeps, links to and never does."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.browsing import DESKTOP, PHONE, PageSession, chromium
from tests.support.long import long
from tests.support.status_pages import ended, failed, hour, job, served, status
from worker.jobs.history import EndedJob
from worker.monitoring.status import BatchStatus, IdleStatus, SlotsStatus, Status, WorkerStatus

HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
PROMPT = "a heron at dawn"
# Asks at once, as a page does that is looked at again.
REFRESH = "document.dispatchEvent(new Event('visibilitychange'))"
PIXELS = 96


def thumbnail_of(path: str) -> bytes | None:
    """Return an image for the jobs of `drawn`; there is no other."""
    if not path.startswith("status/thumbnail/"):
        return None
    content = BytesIO()
    Image.new("RGB", (PIXELS, PIXELS // 2), "teal").save(content, "JPEG")
    return content.getvalue()


def drawn(number: int, *urls: str) -> EndedJob:
    made = ended(number)
    return replace(made, prompt=PROMPT, result_urls=urls, thumbnail=f"status/thumbnail/{made.task_id}.jpg")


def presigned(seconds_ago: float) -> str:
    """Return an address that was signed for one hour."""
    signed_at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    query = f"X-Amz-Date={signed_at:%Y%m%dT%H%M%SZ}&X-Amz-Expires=3600&X-Amz-Signature=abc"
    return f"https://media.example.com/generations/gen-1.png?{query}"


@dataclass
class Shown:
    """The page of a worker whose status the test chooses. One context for all tests: each costs half a second."""

    visit: PageSession
    url: str
    statuses: list[Status] = field(default_factory=list)

    @property
    def page(self) -> Page:
        return self.visit.page

    def load(self, made: Status | None = None, fragment: str = "") -> Page:
        """Show a status on a page that is loaded anew."""
        self.statuses[:] = [made or status()]
        if fragment or "#" in self.page.url:
            self.page.goto("about:blank")  # a fragment alone would not load it
        self.visit.complaints.clear()
        self.visit.requested.clear()
        self.page.goto(self.url + fragment)
        expect(self.page.locator("#state")).not_to_have_text("connecting")
        return self.page

    def update(self, made: Status) -> None:
        """Have the loaded page show another status."""
        self.statuses[:] = [made]
        with self.page.expect_response("**/status.json"):
            self.page.evaluate(REFRESH)
        expect(self.page.locator("#worker-name")).to_contain_text(made.worker.name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def site(browser: Browser) -> Iterator[Shown]:
    statuses = [status()]
    with served(lambda: replace(statuses[0], at=time.time()), thumbnail_of) as url, PageSession(browser) as visit:
        yield Shown(visit, url, statuses)


@pytest.fixture
def shown(site: Shown) -> Shown:
    """The page as it is for everybody: no test's window or colours."""
    site.page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
    site.page.emulate_media(color_scheme="light", reduced_motion="no-preference")
    return site


def text_of(locator: Locator) -> str:
    return " ".join((locator.text_content() or "").split())


# --- What it shows


def test_page_shows_the_worker_without_a_complaint_or_a_foreign_request(shown: Shown) -> None:
    page = shown.load()

    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#headline")).to_have_text("Drawing 5 images")
    expect(page).to_have_title("Drawing 5 images · Darkroom")
    expect(page.locator("#lanes-of")).to_have_text(" of 10")
    expect(page.locator("#jobs > li")).to_have_count(6)
    expect(page.get_by_role("progressbar", name="Job 48213")).to_have_attribute("aria-valuenow", "40")
    expect(page.get_by_role("img", name="5 in use, 7 loaded, 4 free")).to_be_visible()
    expect(page.get_by_role("row", name="image_generation.dead 1")).to_be_visible()
    expect(page.get_by_role("columnheader", name="Ready")).to_be_visible()
    assert shown.visit.complaints == []
    assert shown.visit.origins == {shown.url}


def test_last_hour_is_shown_in_numbers_and_bars(shown: Shown) -> None:
    page = shown.load(
        status(last_hour=hour(complete=(2, 0, 4), failed=(0, 1, 0), seconds=(6.0, None, 12.0), waiting=()))
    )

    assert [text_of(page.locator(f"#{name}")) for name in ("rate", "took", "queue")] == ["19.4", "7.61 s", "14"]
    more = [text_of(page.locator(f"#{name}-more")) for name in ("rate", "took", "queue")]
    assert more == ["6 in the last hour, 1 failed", "p95 10.2 s", "waited 3 s, p95 41 s"]
    expect(page.get_by_role("img", name="Jobs a minute, the last hour: at most 4, now 4")).to_be_visible()
    # A bar for each minute that has a value, the current one at the right edge, and its height is its share of the most
    paths = [page.locator(f"#{name}-chart path").first.get_attribute("d") for name in ("rate", "took", "queue")]
    assert paths == [
        "M57.1 24.00v-12.00h.8v12.00zM59.1 24.00v-24.00h.8v24.00z",
        "M57.1 24.00v-12.00h.8v12.00zM59.1 24.00v-24.00h.8v24.00z",
        "",
    ]
    assert page.locator("#rate-chart path.bad").get_attribute("d") == "M58.1 24.00v-6.00h.8v6.00z"


def test_page_of_a_worker_without_jobs_says_so(shown: Shown) -> None:
    nothing = hour(
        seconds_p50=None, seconds_p95=None, waited_p50=None, waited_p95=None,
        complete=(0,), failed=(0,), seconds=(None,), waiting=(None,),
    )  # fmt: skip
    page = shown.load(
        status(headline="Loading the model", model=None, jobs=(), last_jobs=(), queues=(), last_hour=nothing, gpu=None)
    )

    expect(page.locator("#headline")).to_have_text("Loading the model")
    for name in ("jobs", "last", "queues", "model"):
        expect(page.locator(f"#{name}-none")).to_be_visible()
    assert [text_of(page.locator(f"#{name}")) for name in ("took", "queue")] == ["–", "–"]
    assert shown.visit.complaints == []


def test_last_jobs_are_ten_until_all_are_asked_for(shown: Shown) -> None:
    page = shown.load()
    expect(page.locator("#last > li")).to_have_count(10)

    page.get_by_role("button", name="Show all 14").click()

    expect(page.locator("#last > li")).to_have_count(14)
    expect(page.locator("#last-all")).to_be_hidden()


# --- Words


def test_every_word_opens_its_explanation_by_keyboard_and_mouse(shown: Shown) -> None:
    page = shown.load()
    tip = page.locator("#word-slot")
    word = page.get_by_role("button", name="slots")
    expect(word).to_have_accessible_description(re.compile("eight ranks of every layer"))

    word.focus()
    page.keyboard.press("Enter")
    expect(tip).to_be_visible()
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()

    word.hover()
    expect(tip).to_be_visible()
    tip.hover()  # it stays while the mouse is on it
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()

    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.get_by_role("button", name="Webhooks parked").hover()
    expect(page.locator("#word-parked")).to_be_visible()
    box = page.locator("#word-parked").bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]

    undescribed = "[...document.querySelectorAll('.term')].filter((one) => !one.popoverTargetElement).length"
    assert page.evaluate(undescribed) == 0
    assert page.locator(".term").count() > 10


@long
def test_word_opens_by_touch_inside_the_window(browser: Browser, shown: Shown) -> None:
    shown.statuses[:] = [status()]
    with PageSession(browser, viewport=PHONE, has_touch=True) as phone:
        phone.page.goto(shown.url)
        word = phone.page.get_by_role("button", name="Webhooks parked")

        word.tap()

        tip = phone.page.locator("#word-parked")
        expect(tip).to_be_visible()
        box = tip.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]


# --- Finished images


def test_finished_job_has_its_image_and_links_to_it(shown: Shown) -> None:
    url = "https://media.example.com/generations/gen-48200.png"
    page = shown.load(status(last_jobs=(drawn(0, url), failed(1, "LORA_NOT_FOUND", "no adapter"))))

    image = page.get_by_role("img", name="Image of job 48200")
    expect(image).to_have_js_property("naturalWidth", PIXELS)
    link = page.locator(".thumbnail")
    expect(link).to_have_count(1)
    assert [link.get_attribute(name) for name in ("href", "target", "rel")] == [url, "_blank", "noopener noreferrer"]
    page.locator("#last summary").first.click()
    expect(page.get_by_role("link", name="the image", exact=True)).to_have_attribute("href", url)
    assert shown.visit.complaints == []
    assert shown.visit.origins == {shown.url}  # the browser asks the bucket for nothing


def test_address_that_has_expired_is_no_link_and_says_so(shown: Shown) -> None:
    page = shown.load(status(last_jobs=(drawn(0, presigned(2.5 * 3600), presigned(0)),)))
    page.locator("#last summary").first.click()

    expect(page.locator("#last .links")).to_have_text(
        re.compile(r"image 1 its address expired 1\sh\sagoimage 2 opens for (5|6)\d\smin more")
    )
    assert page.locator("#last .links a").first.get_attribute("href") is None
    expect(page.get_by_role("link", name="image 2")).to_have_attribute("href", re.compile("X-Amz-Signature"))
    assert page.locator(".thumbnail").get_attribute("href") is None


def test_address_without_http_is_text(shown: Shown) -> None:
    urls = ["javascript:document.title='run'", "data:text/html,x", "//evil.example", HOSTILE]
    page = shown.load(status(last_jobs=tuple(drawn(number, url) for number, url in enumerate(urls))))

    for number, url in enumerate(urls):
        page.locator("#last summary").nth(number).click()
        expect(page.locator("#last .links").nth(number)).to_have_text(f"the image {url}")
    assert page.locator("main a[href]").count() == 0


def test_hostile_text_is_shown_as_text_and_does_not_run(shown: Shown) -> None:
    page = shown.load(
        status(
            headline=HOSTILE,
            worker=WorkerStatus(HOSTILE, HOSTILE, 0.0, 1.0, HOSTILE),
            jobs=(job(1, adapters=(HOSTILE,), phase=HOSTILE, prompt=HOSTILE, generation_id=HOSTILE),),
            last_jobs=(
                replace(
                    failed(1, HOSTILE, HOSTILE),
                    outcome=HOSTILE,
                    prompt=HOSTILE,
                    generation_id=HOSTILE,
                    result_urls=(HOSTILE,),
                ),
            ),
            idle=replace(status().idle, reason=HOSTILE),
        )
    )
    page.locator("#last summary").click()

    expect(page.locator("#last .message")).to_have_text(HOSTILE)
    expect(page.locator("#jobs .prompt")).to_have_text(HOSTILE)
    expect(page).to_have_title(f"{HOSTILE} · Darkroom")
    assert page.locator("main script, main img").count() == 0
    assert shown.visit.complaints == []
    assert shown.visit.origins == {shown.url}


# --- The filter


def test_filter_finds_generations_and_goes_into_the_address(shown: Shown) -> None:
    page = shown.load()

    page.get_by_label("Generation").fill("481")

    # All of them, though only ten are shown without a filter
    expect(page.locator("#last .id")).to_have_text([f"#{48199 - number}" for number in range(13)])
    expect(page.locator("#jobs-none")).to_have_text("None at work matches.")
    expect(page.locator("#filter-result")).to_have_text("13 found")
    assert page.url == f"{shown.url}#generation=481"
    page.get_by_label("Generation").fill("")
    assert page.url == shown.url
    expect(page.locator("#jobs > li")).to_have_count(6)


def test_address_with_a_filter_shows_what_it_found_and_what_comes_later(shown: Shown) -> None:
    page = shown.load(fragment="#generation=order%2F48187")
    expect(page.get_by_label("Generation")).to_have_value("order/48187")
    expect(page.locator("#last > li")).to_have_count(0)

    made = status()
    shown.update(replace(made, last_jobs=(*made.last_jobs, ended(14, generation_id="Order/48187-2"))))

    # Whatever the case of its letters
    expect(page.locator("#last .id")).to_have_text(["#Order/48187-2"])
    page.evaluate("location.hash = '#generation=48216'")
    expect(page.locator("#jobs .id")).to_have_text(["#48216"])
    expect(page.locator("#last-none")).to_have_text("None of the last jobs matches.")


# --- Updates


def test_what_a_person_does_on_the_page_survives_its_updates(shown: Shown) -> None:
    made = status(last_jobs=(ended(1), failed(2, "LORA_NOT_FOUND", "the adapter does not exist")))
    page = shown.load(made)
    row = page.locator("#last > li").nth(1)
    expect(row.locator(".message")).to_have_count(0)
    row.locator("summary").click()
    expect(row.locator(".message")).to_have_text("the adapter does not exist")
    expect(row.locator(".stages li")).to_have_text(["ledger14 ms", "fetch2.20 s", "record20 ms", "notify30 ms"])
    page.locator("#jobs .id").nth(1).select_text()
    page.get_by_role("button", name="image_generation.dead").focus()

    moved = tuple(replace(one, step_index=one.step_index + 1, seconds=99.0) for one in made.jobs)
    depths = tuple(replace(one, num_messages=one.num_messages + 7) for one in made.queues)
    shown.update(replace(made, last_jobs=(ended(0), *made.last_jobs), jobs=moved, queues=depths))

    expect(page.locator("#last .id")).to_have_text(["#48200", "#48199", "#48198"])
    expect(page.locator("#last > li").nth(2).locator(".stages")).to_be_visible()
    assert page.evaluate("getSelection().toString()") == "#48212"
    expect(page.get_by_role("button", name="image_generation.dead")).to_be_focused()


# What of the page a person sees or hears, by element; the age of the numbers is of the moment it is looked at.
SHOWN = """() => [...document.querySelectorAll("main, main *, header *, title")].map((node) => [
  node.tagName, node.id, node.getAttribute("class"),
  [...node.childNodes].filter((one) => one.nodeType === 3).map((one) => one.textContent).join("|"),
  ["aria-label", "aria-valuenow", "aria-valuetext", "data-state", "data-outcome", "data-task", "style", "src", "d",
   "href"].map((name) => node.getAttribute(name)),
  node.hidden,
].join(" # ")).filter((line) => !line.includes(" # ago # "))"""


def test_updated_page_equals_a_reloaded_one(shown: Shown) -> None:
    before = status()
    after = status(
        headline="Not taking jobs: stopping",
        worker=replace(before.worker, name="another:1", uptime_seconds=9000.0, why_not_ready="stopping"),
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
        last_hour=hour(jobs_per_minute=0.5, complete=(1, 2, 3), failed=(0, 0, 9), waiting=(None, 5, 0)),
        last_jobs=(drawn(20, "https://media.example.com/1.png"), *before.last_jobs),
    )
    page = shown.load(before)
    shown.update(after)
    updated = page.evaluate(SHOWN)
    expect(page.locator("#idle-legend li").first).to_have_text("denoising 6.7 %1 min 40 s")

    shown.load(after)

    assert len(updated) > 200
    assert page.evaluate(SHOWN) == updated


def test_numbers_that_change_move_nothing(shown: Shown) -> None:
    made = status(batch=BatchStatus(1, 10, 11111, 1.11, 1.11), outcomes={"complete": 1111})
    page = shown.load(made)
    places = """[...document.querySelectorAll('.tile, .trend, section, #jobs > li, svg')]
      .map((node) => node.getBoundingClientRect().toJSON())"""
    before = page.evaluate(places)

    moved = tuple(replace(one, step_index=one.step_index + 1, seconds=one.seconds + 1) for one in made.jobs)
    batch = BatchStatus(8, 10, 88888, 8.88, 8.88)
    slow = hour(jobs_per_minute=188.8, seconds_p50=88.8, seconds_p95=98.8, waited_p50=88.0, complete=(8888,))
    shown.update(replace(made, jobs=moved, batch=batch, outcomes={"complete": 8888}, last_hour=slow))

    expect(page.locator("#done")).to_have_text("8,888")
    assert page.evaluate(places) == before


def test_paused_page_stays_as_it_is(shown: Shown) -> None:
    page = shown.load()
    page.get_by_role("button", name="Pause").click()

    shown.statuses[:] = [status(headline="Waiting for jobs")]
    page.wait_for_load_state("networkidle")
    num_before = len(shown.visit.requested)
    page.evaluate(REFRESH)
    expect(page.locator("#updated")).to_contain_text("paused")
    assert len(shown.visit.requested) == num_before
    assert text_of(page.locator("#headline")) == "Drawing 5 images"
    expect(page.locator("#stale")).to_be_hidden()

    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#headline")).to_have_text("Waiting for jobs")


def test_lost_worker_is_shown_and_a_hidden_page_asks_for_nothing(browser: Browser, shown: Shown) -> None:
    hide = "(h) => { Object.defineProperty(document, 'hidden', {value: h, configurable: true}); " + REFRESH + "; }"
    shown.statuses[:] = [status()]
    with PageSession(browser) as visit:
        visit.page.clock.install()
        visit.page.goto(shown.url)
        expect(visit.page.locator("#state")).to_have_text("ready")
        expect(visit.page.locator("#stale")).to_be_hidden()

        visit.page.route("**/status.json", lambda route: route.abort())
        visit.page.clock.run_for(90_000)

        expect(visit.page.get_by_role("alert")).to_contain_text(
            re.compile(r"cannot be reached\. These numbers are 1\smin\s\d+\ss old")
        )
        expect(visit.page.locator("#state")).to_have_text("not reached")

        visit.page.unroute("**/status.json")
        visit.page.clock.run_for(3_000)
        expect(visit.page.locator("#stale")).to_be_hidden()
        expect(visit.page.locator("#state")).to_have_text("ready")

        visit.page.evaluate(hide, True)
        visit.page.clock.run_for(2_000)
        visit.page.wait_for_load_state("networkidle")
        num_before = len(visit.requested)
        visit.page.clock.run_for(60_000)
        assert len(visit.requested) == num_before

        with visit.page.expect_response("**/status.json"):
            visit.page.evaluate(hide, False)
        expect(visit.page.locator("#stale")).to_be_hidden()


# --- Looks


def worst_case() -> Status:
    long_id = str(2**63 - 1)
    return status(
        headline=f"Not taking jobs: {'y' * 80}",
        worker=WorkerStatus(
            "a-host-of-a-very-long-name-in-some-cluster-7f6c9d8b5-x2x2x:17", "0.1.0", 0.0, 1e7, "y" * 80
        ),
        batch=BatchStatus(256, 256, 10**9, 255.99, 255.99),
        slots=SlotsStatus(1000, 20, 4),
        jobs=(job(1, generation_id=long_id, adapters=("x" * 300,) * 4, prompt="y" * 4000),),
        last_hour=hour(jobs_per_minute=9999.9, seconds_p50=35999.0, seconds_p95=86000.0, complete=(10**6,)),
        last_jobs=(
            replace(
                failed(1, "STORAGE_UNAVAILABLE", "z" * 500),
                generation_id=long_id,
                prompt="y" * 4000,
                seconds=35999.0,
                result_urls=("https://media.example.com/" + "z" * 500, "z" * 500),
                thumbnail="status/thumbnail/1.jpg",
            ),
        ),
    )


def test_page_never_scrolls_sideways(shown: Shown) -> None:
    page = shown.load(worst_case())
    page.locator("#last summary").click()
    expect(page.locator("#last .message")).to_be_visible()

    wide = []
    for width in (320, 360, 390, 620, 621, 1000, 1001, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        if shown.visit.scrolls_sideways():
            wide.append(width)
    assert wide == []


# Of elements with a duration, those whose text takes more than one line.
WRAPPED = """() => [...document.querySelectorAll(".took, .ago, #took, #idle-legend li, .stages li, .row b, #model dd")]
  .filter((node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return range.getBoundingClientRect().height > 1.9 * parseFloat(getComputedStyle(node).fontSize);
  }).map((node) => node.textContent)"""


@pytest.mark.parametrize("width", [390, pytest.param(1280, marks=long)])
def test_durations_do_not_wrap(shown: Shown, width: int) -> None:
    days = dict.fromkeys(("no_jobs", "fetching", "encoding", "decoding"), 86400.0 * 123 + 3600 * 22)
    page = shown.load(
        status(
            last_jobs=(drawn(0), ended(1, seconds=3599.0), ended(2, seconds=35999.0)),
            last_hour=hour(seconds_p50=3599.0),
            idle=IdleStatus(None, 86400.0 * 123, days),
        )
    )
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#last summary").first.click()
    expect(page.locator("#last .stages")).to_be_visible()

    assert page.evaluate(WRAPPED) == []
    assert not shown.visit.scrolls_sideways()


def test_jobs_come_before_slots_on_a_phone(shown: Shown) -> None:
    page = shown.load()
    page.set_viewport_size({"width": 390, "height": 844})

    tops = {}
    for name in ("headline", "jobs", "last", "slots", "queues", "model"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        tops[name] = box["y"]

    assert sorted(tops, key=tops.__getitem__) == list(tops)


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
    const name = node.getAttribute("class") || node.tagName;
    found.push([(light + 0.05) / (dark + 0.05), `${name}: ${node.textContent.slice(0, 40)}`]);
  }
  return found;
}"""


def test_every_text_has_the_contrast_of_wcag_aa_in_both_schemes(shown: Shown) -> None:
    grounds: dict[Any, range] = {"light": range(216, 256), "dark": range(40)}
    made = status()
    page = shown.load(status(last_jobs=(drawn(0, presigned(0)), *made.last_jobs[1:])))
    for number in range(2):
        page.locator("#last summary").nth(number).click()
    expect(page.locator("#last .message").nth(1)).to_be_visible()
    page.get_by_role("button", name="Stages").click()

    for scheme, ground in grounds.items():
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # no colour is in between
        contrasts = page.evaluate(CONTRASTS)

        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", colour)[:3])) // 3 in ground
        assert len(contrasts) > 100
        assert [one for one in contrasts if one[0] < 4.5] == []


def test_animations_are_off_with_reduced_motion(shown: Shown) -> None:
    moving = "[...document.querySelectorAll('*')].filter((n) => getComputedStyle(n).transitionDuration !== '0s').length"
    page = shown.load()
    assert page.evaluate(moving) > 0

    page.emulate_media(reduced_motion="reduce")

    assert page.evaluate(moving) == 0
