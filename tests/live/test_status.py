"""The status of a whole worker, by its JSON and by its page in a real Chromium, while jobs come, run, fail and end."""

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.browsing import PHONE, PageSession, chromium
from tests.support.world import Worker, World, eventually, new_world

SLOW = 150
PROMPT = "a red fox under seven moons"
SECRET = "nobody shall read this"
HOSTILE = "<script>document.title=1</script><img src=x onerror=document.title=1>"
STAGES = ["ledger", "fetch", "wait", "adapt", "encode", "denoise", "decode", "sign", "store", "record", "notify"]


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        made.start_worker(MAX_CONCURRENT_GENERATIONS="3").wait_until_ready()
        made.upload_demo_adapter("neon")
        yield made


@pytest.fixture(scope="module")
def worker(world: World) -> Worker:
    return world.workers[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def read_status(worker: Worker) -> dict[str, Any]:
    return json.loads(worker.get("/status.json")[1])  # type: ignore[no-any-return]


def at_work(worker: Worker, generation_id: int) -> dict[str, Any]:
    """Return the row of a job at work; empty while there is none."""
    return next((job for job in read_status(worker)["jobs"] if job["generation_id"] == str(generation_id)), {})


def wait_for_row(worker: Worker, generation_id: int) -> dict[str, Any]:
    """Return the row of a job that has ended: it is written behind the ack, so a moment after the webhook."""

    def rows() -> list[dict[str, Any]]:
        return [job for job in read_status(worker)["last_jobs"] if job["generation_id"] == str(generation_id)]

    eventually(lambda: bool(rows()), worker.log_tail)
    return rows()[0]


def test_idle_worker_s_status_has_its_name_and_idle_reason(world: World, worker: Worker) -> None:
    eventually(lambda: read_status(worker)["idle"]["reason"] == "no_jobs" and bool(read_status(worker)["queues"]))

    status = read_status(worker)

    assert status["worker"]["name"].endswith(f":{worker.process.pid}")
    assert status["worker"]["why_not_ready"] == ""
    assert (status["model"]["model"], status["model"]["device"], status["model"]["dtype"]) == (
        "checkpoint",
        "cpu",
        "float32",
    )
    assert status["batch"]["max_lanes"] == 3
    assert status["jobs"] == []
    assert {queue["role"] for queue in status["queues"]} >= {"jobs", "outbox", "dead", "recover"}
    assert {queue["name"] for queue in status["queues"]} >= {world.queue, f"{world.queue}.dead"}
    assert status["idle"]["seconds"]["engine_starting"] > 0


def test_a_job_moves_on_in_the_json_and_on_the_page(
    world: World, worker: Worker, browser: Browser, tmp_path: Path
) -> None:
    with PageSession(browser) as visit:
        visit.page.goto(f"http://127.0.0.1:{worker.port}/")
        expect(visit.page.locator("#state")).to_have_text("ready")
        slow = world.publish(prompt=PROMPT, num_inference_steps=SLOW, num_images=3, lora_path="models/neon.safetensors")

        # When it is being denoised, then its steps are told and grow
        eventually(lambda: at_work(worker, slow).get("step_index", 0) > 0, worker.log_tail)
        first = at_work(worker, slow)
        assert (first["phase"], first["num_steps"], first["num_images"]) == ("denoise", SLOW, 3)
        assert first["adapters"] == ["models/neon.safetensors"]
        eventually(lambda: at_work(worker, slow).get("step_index", 0) > first["step_index"], worker.log_tail)

        # And the page shows the same, without having been loaded again
        bar = visit.page.get_by_role("progressbar", name=f"Job {slow}")
        expect(bar).to_have_attribute("aria-valuetext", re.compile(rf"denoising, step \d+ of {SLOW}"))
        seen = int(bar.get_attribute("aria-valuenow") or 0)
        visit.page.screenshot(path=tmp_path / "at-work.png", full_page=True)
        expect(visit.page.locator("#lanes")).to_have_text("3 of 3")
        expect(visit.page.locator("#idle-answer")).to_have_text(re.compile("It is not"))
        expect(bar).not_to_have_attribute("aria-valuenow", str(seen))
        assert PROMPT not in visit.text

        # And once it has ended it is the newest of the last jobs, with every stage
        assert world.wait_for_end(slow).kind == "complete"
        row = visit.page.locator("#last > li").first
        expect(row.locator(".id")).to_have_text(f"#{slow}")
        expect(row.locator(".pill")).to_have_text("complete")
        row.locator("summary").click()
        expect(row.locator(".stages li")).to_have_text([re.compile(f"^{stage}") for stage in STAGES])
        assert visit.complaints == []
        assert visit.origins == {f"http://127.0.0.1:{worker.port}/"}

    ended = wait_for_row(worker, slow)
    assert [stage["name"] for stage in ended["stages"]] == STAGES
    assert (ended["outcome"], ended["num_steps"], ended["prompt"]) == ("complete", SLOW, None)
    status = read_status(worker)
    assert status["outcomes"]["complete"] >= 1
    assert status["batch"]["mean"] == pytest.approx(3, abs=0.5)
    assert status["idle"]["denoising_seconds"] > 0
    assert PROMPT not in json.dumps(status)
    assert "generations/" not in json.dumps(status)


def test_a_failed_job_shows_its_code_and_its_hostile_text_does_not_run(
    world: World, worker: Worker, browser: Browser, tmp_path: Path
) -> None:
    failed = world.publish(lora_path=f"models/{HOSTILE}.safetensors")
    assert world.wait_for_end(failed).body["error_code"] == "LORA_NOT_FOUND"

    row = wait_for_row(worker, failed)

    assert (row["outcome"], row["code"]) == ("failed", "LORA_NOT_FOUND")
    assert HOSTILE in row["message"]
    with PageSession(browser, viewport=PHONE, color_scheme="dark") as visit:
        visit.page.goto(f"http://127.0.0.1:{worker.port}/")
        shown = visit.page.locator("#last > li", has_text=f"#{failed}")
        expect(shown.locator(".code")).to_have_text("LORA_NOT_FOUND")
        shown.locator("summary").click()
        expect(shown.locator(".message")).to_contain_text(HOSTILE)
        visit.page.screenshot(path=tmp_path / "failed-phone.png", full_page=True)
        assert visit.page.locator("main script, main img").count() == 0
        assert not visit.scrolls_sideways()
        assert "Darkroom" in visit.page.title()
        assert visit.complaints == []


def test_status_page_leaves_out_quotations_of_the_message(world: World, worker: Worker) -> None:
    quoted = [
        world.publish(negative_prompt=SECRET + "x" * 5000),
        world.publish(artist_name=f"{SECRET} {HOSTILE} {HOSTILE}"),
        world.publish(aspect_ratio=SECRET),
    ]
    for generation_id in quoted:
        # Given that the backend, which wrote it, is told all of it
        assert "nobody" in world.wait_for_end(generation_id).body["error_message"]

        row = wait_for_row(worker, generation_id)
        assert row["code"]
        assert row["message"].endswith("…")

    assert SECRET not in worker.get("/status.json")[1]


def test_prompts_and_previews_are_shown_by_the_setting_alone(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, browser: Browser, tmp_path: Path
) -> None:
    with new_world(rabbitmq, s3_server, tmp_path) as own, PageSession(browser) as visit:
        worker = own.start_worker(STATUS_SHOW_PROMPTS="true", PREVIEW_EVERY="2")
        worker.wait_until_ready()
        visit.page.goto(f"http://127.0.0.1:{worker.port}/")
        generation_id = own.publish(prompt=PROMPT, task_id=str(uuid.uuid4()), num_inference_steps=100)

        # While the job is at work its newest preview is on the page, of its shape and from the worker itself
        preview = visit.page.get_by_role("img", name=f"Preview of job {generation_id}")
        expect(preview).to_have_js_property("naturalWidth", 64)
        first = preview.get_attribute("src")
        visit.page.screenshot(path=tmp_path / "preview.png", full_page=True)
        expect(preview).not_to_have_attribute("src", str(first))
        assert visit.origins == {f"http://127.0.0.1:{worker.port}/"}

        # And the backend is told where it is in the bucket
        assert own.wait_for_end(generation_id).kind == "complete"
        urls = [call.body.get("preview_url") for call in own.backend.calls("progress", generation_id)]
        key = f"previews/gen-{generation_id}.jpg"
        assert urls[-1] == f"{own.store.endpoint_url}/{own.bucket}/{key}"
        stored = own.store.client().get_object(Bucket=own.bucket, Key=key)
        assert (stored["ContentType"], stored["CacheControl"]) == ("image/jpeg", "no-store")
        image = Image.open(stored["Body"])
        assert (image.format, image.size) == ("JPEG", (64, 64))

        assert wait_for_row(worker, generation_id)["prompt"] == PROMPT
        visit.page.locator("#last summary").click()
        expect(visit.page.locator("#last .facts")).to_contain_text(PROMPT)
        expect(preview).to_have_count(0)
