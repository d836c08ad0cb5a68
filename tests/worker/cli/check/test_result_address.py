"""The row "result address": what a reader meets who has a picture's address and nothing else."""

from typing import Any

import pytest

from clients.storage.client import Storage
from config.store import StoreSettings
from examples.parts.seaweedfs import SeaweedFS
from tests.support.servers.clients_servers import AnsweringServer, answer, refused_url
from worker.cli.check.checks import CheckFailed, CheckUnsure
from worker.cli.check.result_address import CONTENT, check_result_address


def settings_of(store: SeaweedFS, bucket: str, **others: Any) -> StoreSettings:
    return StoreSettings(**store.env(bucket), **others)  # type: ignore[arg-type]


def said_of(store: SeaweedFS, bucket: str, **others: Any) -> str:
    """Run the check; it must leave nothing behind."""
    settings = settings_of(store, bucket, **others)
    try:
        return check_result_address(settings)
    finally:
        assert [*Storage(settings).list_objects(bucket, "")] == []


def test_plain_address_of_a_private_bucket_is_reported_with_the_setting_that_opens_it(
    s3_server: SeaweedFS, bucket: str
) -> None:
    said = said_of(s3_server, bucket)

    assert "does not open without credentials (HTTP 403): RESULT_URL_MODE=presigned:SECONDS" in said
    assert "cannot be reached from here" in said_of(s3_server, bucket, RESULT_URL_BASE=refused_url())


def test_plain_address_of_a_public_bucket_opens(s3_server: SeaweedFS, bucket: str) -> None:
    with AnsweringServer([answer(200, CONTENT)]) as server:
        assert said_of(s3_server, bucket, RESULT_URL_BASE=server.url).endswith("opens without credentials")

        assert server.requests[0].startswith(b"GET /generations/check-")
        assert b"Authorization" not in server.requests[0]


def test_presigned_address_opens_for_its_seconds(s3_server: SeaweedFS, bucket: str) -> None:
    said = said_of(s3_server, bucket, RESULT_URL_MODE="presigned:3600")

    assert said == f"{s3_server.endpoint_url}/{bucket}/generations/… opens for 3600 s"


@pytest.mark.parametrize(
    ("said", "words"), [(answer(403), "HTTP 403"), (answer(302, Location="/"), "HTTP 302"), (answer(200), "another")]
)
def test_presigned_address_at_what_is_no_store_is_bad(
    s3_server: SeaweedFS, bucket: str, said: bytes, words: str
) -> None:
    with (
        AnsweringServer([said]) as cdn,
        pytest.raises(CheckFailed, match=rf"does not open: .*{words}.*RESULT_URL_BASE"),
    ):
        said_of(s3_server, bucket, RESULT_URL_MODE="presigned:60", RESULT_URL_BASE=cdn.url)


def test_presigned_address_that_only_readers_reach_is_unsure(s3_server: SeaweedFS, bucket: str) -> None:
    with pytest.raises(CheckUnsure, match="Where readers can, all is well"):
        said_of(s3_server, bucket, RESULT_URL_MODE="presigned:60", RESULT_URL_BASE=refused_url())


def test_store_that_takes_no_probe_is_bad(s3_server: SeaweedFS, bucket: str) -> None:
    wrong = s3_server.env(bucket) | {"AWS_SECRET_ACCESS_KEY": "wrong"}

    with pytest.raises(CheckFailed, match=f"no address can be tried: s3://{bucket}"):
        check_result_address(StoreSettings(**wrong))  # type: ignore[arg-type]
