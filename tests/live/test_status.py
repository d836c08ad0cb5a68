"""The status of whole workers, by its JSON and by its page in a real Chromium, while jobs come, run, fail and end.

The workers' engine runs without torch: it holds a job in the middle of its steps for as long as the page is looked at.
"""

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.browsing import PHONE, PageSession, chromium
from tests.support.world import Worker, World, eventually, new_world

NUM_STEPS = 8
HELD = "hold@4"  # a prompt: three steps are done and reported
PROMPT = f"a red fox under seven moons {HELD}"
SECRET = "nobody shall read this"
HOSTILE = "<script>document.title=1</script><img src=x onerror=document.title=1>"
STAGES = ["ledger", "fetch", "wait", "adapt", "encode", "denoise", "decode", "sign", "store", "record", "notify"]


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(rabbitmq, s3_server, tmp_path_factory.mktemp("world")) as made:
        start_light_worker(made, MAX_CONCURRENT_GENERATIONS="3")
        made.upload_demo_adapter("neon")
        yield made


@pytest.fixture(scope="module")
def worker(world: World) -> Worker:
    return world.workers[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def address_of(worker: Worker) -> str:
    return f"http://127.0.0.1:{worker.port}/"


def read_status(worker: Worker) -> dict[str, Any]:
    return json.loads(worker.get("/status.json")[1])  # type: ignore[no-any-return]


def wait_for_row(worker: Worker, generation_id: int) -> dict[str, Any]:
    """Return the row of a job that has ended: it is written behind the ack, so a moment after the webhook."""

    def rows() -> list[dict[str, Any]]:
        return [job for job in read_status(worker)["last_jobs"] if job["generation_id"] == str(generation_id)]

    eventually(lambda: bool(rows()), worker.log_tail)
    return rows()[0]


def publish_held(world: World, prompt: str = PROMPT, **fields: Any) -> tuple[int, str]:
    """Publish a job that the engine holds in its fourth step; return its generation and its task."""
    task_id = str(uuid.uuid4())
    return world.publish(task_id=task_id, prompt=prompt, num_inference_steps=NUM_STEPS, **fields), task_id


def release(world: World, held: str) -> None:
    """Have the engine go on with a task, or, by its id and a step, until it is held again."""
    (world.folder / f"go-{held}").touch()


def test_idle_worker_s_status_has_its_name_and_idle_reason(world: World, worker: Worker) -> None:
    eventually(lambda: read_status(worker)["idle"]["reason"] == "no_jobs" and bool(read_status(worker)["queues"]))

    status = read_status(worker)

    assert status["headline"] == "Waiting for jobs"
    assert status["worker"]["name"].endswith(f":{worker.process.pid}")
    assert status["worker"]["why_not_ready"] == ""
    assert (status["model"]["model"], status["model"]["device"], status["model"]["dtype"]) == ("fake", "cpu", "float32")
    assert status["batch"]["max_lanes"] == 3
    assert status["jobs"] == []
    assert {queue["role"] for queue in status["queues"]} >= {"jobs", "outbox", "dead", "recover"}
    assert {queue["name"] for queue in status["queues"]} >= {world.queue, f"{world.queue}.dead"}
    assert status["last_hour"]["waiting"][-1] == 0
    assert status["idle"]["seconds"]["engine_starting"] > 0


def test_a_job_moves_on_in_the_json_and_on_the_page(world: World, worker: Worker, browser: Browser) -> None:
    with PageSession(browser) as visit:
        visit.page.goto(address_of(worker))
        expect(visit.page.locator("#headline")).to_have_text("Waiting for jobs")
        held, task_id = publish_held(world, num_images=2, lora_path="models/neon.safetensors")

        # While it is being denoised, the page shows it without having been loaded again
        bar = visit.page.get_by_role("progressbar", name=f"Job {held}")
        expect(bar).to_have_attribute("aria-valuetext", f"denoising, step 3 of {NUM_STEPS}")
        expect(visit.page.locator("#headline")).to_have_text("Drawing 1 image")
        (row,) = read_status(worker)["jobs"]
        assert (row["phase"], row["step_index"], row["num_steps"], row["num_images"]) == ("denoise", 3, NUM_STEPS, 2)
        assert row["adapters"] == ["models/neon.safetensors"]

        # And once it has ended it is the newest of the last jobs, with every stage, and no image
        release(world, task_id)
        assert world.wait_for_end(held).kind == "complete"
        ended = visit.page.locator("#last > li").first
        expect(ended.locator(".id")).to_have_text(f"#{held}")
        expect(ended.locator(".pill")).to_have_text("complete")
        ended.locator("summary").click()
        expect(ended.locator(".stages li")).to_have_text([re.compile(f"^{stage}") for stage in STAGES])
        expect(visit.page.locator("#headline")).to_have_text("Waiting for jobs")
        assert visit.page.locator("main img").count() == 0
        assert PROMPT not in visit.text
        assert visit.complaints == []
        assert visit.origins == {address_of(worker)}

    row = wait_for_row(worker, held)
    assert [stage["name"] for stage in row["stages"]] == STAGES
    assert (row["outcome"], row["num_steps"], row["prompt"], row["result_urls"]) == ("complete", NUM_STEPS, None, [])
    assert worker.get(f"/status/thumbnail/{task_id}.jpg")[0] == 404
    status = read_status(worker)
    assert status["outcomes"]["complete"] == 1
    assert sum(status["last_hour"]["complete"]) == 1
    assert status["last_hour"]["seconds_p50"] == row["seconds"]
    assert status["batch"]["mean"] == 1
    assert status["idle"]["denoising_seconds"] > 0
    assert PROMPT not in json.dumps(status)
    assert "generations/" not in json.dumps(status)


def test_a_failed_job_shows_its_code_and_its_hostile_text_does_not_run(
    world: World, worker: Worker, browser: Browser
) -> None:
    failed = world.publish(lora_path=f"models/{HOSTILE}.safetensors")
    assert world.wait_for_end(failed).body["error_code"] == "LORA_NOT_FOUND"

    row = wait_for_row(worker, failed)

    assert (row["outcome"], row["code"]) == ("failed", "LORA_NOT_FOUND")
    assert HOSTILE in row["message"]
    with PageSession(browser, viewport=PHONE, color_scheme="dark") as visit:
        visit.page.goto(f"{address_of(worker)}#generation={failed}")
        shown = visit.page.locator("#last > li")
        expect(shown.locator(".id")).to_have_text([f"#{failed}"])
        expect(shown.locator(".code")).to_have_text("LORA_NOT_FOUND")
        shown.locator("summary").click()
        expect(shown.locator(".message")).to_contain_text(HOSTILE)
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


def test_prompts_and_images_are_shown_by_the_setting_alone(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shown")
    with new_world(rabbitmq, s3_server, folder) as own, PageSession(browser) as visit:
        worker = start_light_worker(own, STATUS_SHOW_PROMPTS="true", PREVIEW_EVERY="2")
        visit.page.goto(address_of(worker))
        prompt = f"{PROMPT} hold@6"
        held, task_id = publish_held(own, prompt)
        key = f"previews/gen-{held}.jpg"

        # While the job is at work its newest preview is on the page
        preview = visit.page.get_by_role("img", name=f"Preview of job {held}")
        expect(preview).to_have_js_property("naturalWidth", 64)
        expect(preview).to_have_attribute("src", f"status/preview/{task_id}.jpg?step=2")
        eventually(lambda: own.keys(key) == [key], worker.log_tail)
        release(own, f"{task_id}-4")
        expect(preview).to_have_attribute("src", f"status/preview/{task_id}.jpg?step=4")

        # And the backend is told where it is in the bucket
        url = f"{own.store.endpoint_url}/{own.bucket}/{key}"
        eventually(lambda: url in [call.body.get("preview_url") for call in own.backend.calls("progress", held)])
        release(own, task_id)
        body = own.wait_for_end(held).body
        stored = own.store.client().get_object(Bucket=own.bucket, Key=key)
        assert (stored["ContentType"], stored["CacheControl"]) == ("image/jpeg", "no-store")
        image = Image.open(stored["Body"])
        assert (image.format, image.size) == ("JPEG", (64, 64))

        # And once it has ended there is its image, a link to the address that the backend got
        row = wait_for_row(worker, held)
        assert (row["prompt"], row["result_urls"]) == (prompt, [body["result_url"]])
        expect(visit.page.get_by_role("img", name=f"Image of job {held}")).to_have_js_property("naturalWidth", 96)
        expect(visit.page.locator("#last .thumbnail")).to_have_attribute("href", body["result_url"])
        visit.page.locator("#last summary").click()
        expect(visit.page.locator("#last .facts")).to_contain_text(PROMPT)
        expect(preview).to_have_count(0)
        assert visit.complaints == []
        assert visit.origins == {address_of(worker)}
