"""Addresses in webhooks: plain as recorded, or presigned for the images of the event's own generation alone."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from clients.storage.client import Storage
from clients.webhooks import WebhookKind
from config.store import StoreSettings
from worker.errors import ErrorCode
from worker.results.result_urls import ResultUrls
from worker.results.terminal_event import TerminalEvent, failed_event

STORE = "https://store.example"
RECORDED = f"{STORE}/pictures/generations/gen-7"


def urls(mode: str) -> ResultUrls:
    settings = StoreSettings(
        AWS_STORAGE_BUCKET_NAME="media",  # type: ignore[call-arg]
        AWS_S3_ENDPOINT_URL=STORE,
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",  # type: ignore[arg-type]
        RESULT_URL_MODE=mode,
    )
    return ResultUrls(Storage(settings), "pictures")


def complete(**body: Any) -> TerminalEvent:
    whole = {"generation_id": 7, "result_url": f"{RECORDED}.png", "metadata": {"seed": 1}} | body
    return TerminalEvent("task", 7, WebhookKind.COMPLETE, whole)


def paths(*found: str) -> list[str]:
    """Return the addresses without their queries, each of which must be a signature for an hour."""
    for url in found:
        query = parse_qs(urlsplit(url).query)
        assert (query["X-Amz-Expires"], len(query["X-Amz-Signature"][0])) == (["3600"], 64)
    return [url.partition("?")[0] for url in found]


def test_plain_addresses_are_sent_as_recorded() -> None:
    event = complete(metadata={"result_urls": [f"{RECORDED}.png", f"{RECORDED}-2.png"]})

    assert urls("plain").webhook_of(event) == event.webhook


def test_every_image_of_the_event_is_presigned_and_the_event_is_not_changed() -> None:
    event = complete(metadata={"seed": 1, "result_urls": [f"{RECORDED}.png", f"{RECORDED}-2.png"]})

    webhook = urls("presigned:3600").webhook_of(event)

    assert paths(webhook.body["result_url"]) == [f"{RECORDED}.png"]
    assert paths(*webhook.body["metadata"]["result_urls"]) == [f"{RECORDED}.png", f"{RECORDED}-2.png"]
    assert (webhook.webhook_id, webhook.body["metadata"]["seed"]) == ("task:complete", 1)
    assert b"X-Amz" not in event.to_json()


def test_failed_event_has_nothing_to_sign() -> None:
    event = failed_event(task_id="task", generation_id=7, code=ErrorCode.GPU_OOM, message="too large", retry_count=0)

    assert urls("presigned:3600").webhook_of(event) == event.webhook


@pytest.mark.parametrize("url", [f"{STORE}/media/jobs/a.json", "s3://media/models/a.safetensors", 7, None])
def test_no_other_object_is_opened_than_the_generation_s_images(url: object) -> None:
    """Others may write to a queue: they must not get an address for what they name there."""
    webhook = urls("presigned:3600").webhook_of(complete(result_url=url, metadata={"result_urls": [url] * 1000}))

    assert paths(webhook.body["result_url"]) == [f"{RECORDED}.png"]
    numbers = ["", *(f"-{number}" for number in range(2, 9))]
    assert paths(*webhook.body["metadata"]["result_urls"]) == [f"{RECORDED}{number}.png" for number in numbers]


@pytest.mark.parametrize("metadata", [None, [], "x", {"result_urls": 7}])
def test_metadata_that_no_worker_wrote_stay_as_they_are(metadata: object) -> None:
    webhook = urls("presigned:3600").webhook_of(complete(metadata=metadata))

    assert webhook.body["metadata"] == metadata


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (complete(), [f"{RECORDED}.png"]),
        (complete(metadata={"result_urls": [f"{RECORDED}.png", 7]}), [f"{RECORDED}.png"]),
        (failed_event(task_id="task", generation_id=7, code=ErrorCode.GPU_OOM, message="", retry_count=0), []),
    ],
)
def test_addresses_are_those_of_the_webhook(event: TerminalEvent, shown: list[str]) -> None:
    assert list(urls("plain").addresses_of(event)) == shown


def test_addresses_of_several_images_are_presigned_as_in_the_webhook() -> None:
    event = complete(metadata={"seed": 1, "result_urls": [f"{RECORDED}.png", f"{RECORDED}-2.png"]})

    assert paths(*urls("presigned:3600").addresses_of(event)) == [f"{RECORDED}.png", f"{RECORDED}-2.png"]
