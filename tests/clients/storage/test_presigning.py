"""Presigned URLs: as AWS and Google document them, and opened by plain HTTP in a real store whose bucket is private."""

import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
import requests
from botocore.credentials import ReadOnlyCredentials

from clients.storage.client import Storage
from clients.storage.errors import AccessDenied
from clients.storage.location import ObjectRef
from clients.storage.presigning import GOOGLE, SigningKey, presigned_url
from clients.storage.transport import s3_client
from config.store import StoreSettings
from examples.parts.seaweedfs import SeaweedFS
from tests.support.servers.google_stand_in import KEY_ID, SECRET, GoogleStandIn

# 24 May 2013, 00:00 UTC: the date of AWS's example, whose key is in every copy of its documentation.
AWS_EXAMPLE_AT = 1_369_353_600.0
AWS_EXAMPLE_KEY = SigningKey("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
ODD_KEYS = ["generations/gen-1.png", "generations/gen-서울 a+b=100%&c?d#e~.png", "generations/gen-'(1)*!.png"]


def presigning(settings: StoreSettings, seconds: int = 60, **others: Any) -> Storage:
    """Return the storage of the same store with presigned result URLs."""
    names = {
        str(field.validation_alias): getattr(settings, name)
        for name, field in StoreSettings.model_fields.items()
        if name in settings.model_fields_set
    }
    return Storage(StoreSettings(**{**names, "RESULT_URL_MODE": f"presigned:{seconds}", **others}))


@pytest.fixture
def ref(store_settings: StoreSettings) -> ObjectRef:
    stored = ObjectRef(store_settings.bucket, ODD_KEYS[0])
    Storage(store_settings).put(stored, b"a picture", content_type="image/png")
    return stored


# --- The signature


def test_signature_is_the_one_of_aws_s_documentation() -> None:
    url = "https://examplebucket.s3.amazonaws.com/test.txt"

    signed = presigned_url(url, AWS_EXAMPLE_KEY, seconds=86400, at=AWS_EXAMPLE_AT, region="us-east-1")

    assert signed == (
        f"{url}?X-Amz-Algorithm=AWS4-HMAC-SHA256"
        "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
        "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


@pytest.mark.parametrize("host", ["media.example", "MEDIA.example:443"])
def test_signature_covers_the_host_as_clients_send_it(host: str) -> None:
    signed = presigned_url(f"https://{host}/a", AWS_EXAMPLE_KEY, seconds=1, at=AWS_EXAMPLE_AT, region="us-east-1")
    plain = presigned_url("https://media.example/a", AWS_EXAMPLE_KEY, seconds=1, at=AWS_EXAMPLE_AT, region="us-east-1")

    assert urlsplit(signed).query == urlsplit(plain).query


def test_temporary_credentials_have_their_token_in_the_signed_query(store_settings: StoreSettings) -> None:
    class RoleCredentials:
        """Credentials as those of an instance's role, which botocore renews."""

        def get_frozen_credentials(self) -> ReadOnlyCredentials:
            return ReadOnlyCredentials("ASIA0", "secret", "a/token+==", None)

    storage = presigning(store_settings)
    storage._credentials = RoleCredentials()

    query = parse_qs(urlsplit(storage.result_url(ObjectRef("media", "a"))).query)

    assert query["X-Amz-Security-Token"] == ["a/token+=="]
    assert query["X-Amz-Credential"][0].startswith("ASIA0/")


def test_url_without_credentials_to_sign_with_is_denied(store_settings: StoreSettings) -> None:
    storage = presigning(store_settings)
    storage._credentials = None

    with pytest.raises(AccessDenied, match="no usable credentials"):
        storage.result_url(ObjectRef("media", "a"))


# --- A real store, its bucket private


@pytest.mark.parametrize("key", ODD_KEYS)
def test_object_opens_by_its_presigned_url_alone(store_settings: StoreSettings, key: str) -> None:
    ref = ObjectRef(store_settings.bucket, key)
    storage = presigning(store_settings)
    storage.put(ref, b"a picture", content_type="image/png", cache_control="private, max-age=60")

    url = storage.result_url(ref)

    assert requests.get(storage.public_url(ref), timeout=60).status_code == 403
    opened = requests.get(url, timeout=60)
    assert (opened.status_code, opened.content) == (200, b"a picture")
    assert (opened.headers["Content-Type"], opened.headers["Cache-Control"]) == ("image/png", "private, max-age=60")


def test_presigned_url_opens_one_object_by_get_alone(store_settings: StoreSettings, ref: ObjectRef) -> None:
    url = presigning(store_settings).result_url(ref)

    assert requests.get(url.replace("gen-1", "gen-2"), timeout=60).status_code == 403
    assert requests.put(url, data=b"another", timeout=60).status_code == 403
    assert requests.delete(url, timeout=60).status_code == 403
    assert requests.get(url, timeout=60).content == b"a picture"


def test_presigned_url_expires_after_its_seconds(store_settings: StoreSettings, ref: ObjectRef) -> None:
    storage = presigning(store_settings, seconds=60)

    for age_seconds, status in ((30, 200), (90, 403)):
        url = storage.result_url(ref, at=time.time() - age_seconds)
        assert requests.get(url, timeout=60).status_code == status, age_seconds


def test_presigned_url_is_under_the_base_that_readers_reach_the_store_by(
    store_settings: StoreSettings, s3_server: SeaweedFS, ref: ObjectRef
) -> None:
    """A worker reaches the store by an internal name, and its readers by another: the signature is for theirs."""
    base = f"http://localhost:{s3_server.port}/{ref.bucket}"

    url = presigning(store_settings, RESULT_URL_BASE=base).result_url(ref)

    assert url.startswith(f"{base}/{ref.key}?")
    assert requests.get(url, timeout=60).content == b"a picture"
    assert requests.get(url.replace("localhost", "127.0.0.1"), timeout=60).status_code == 403


def test_plain_url_has_no_query(store_settings: StoreSettings, ref: ObjectRef) -> None:
    storage = Storage(store_settings)

    assert not storage.is_presigning
    assert storage.result_url(ref) == storage.public_url(ref)


def test_session_token_of_the_settings_is_signed_and_sent(tmp_path: Path) -> None:
    settings = StoreSettings(
        AWS_STORAGE_BUCKET_NAME="media",  # type: ignore[call-arg]
        AWS_ACCESS_KEY_ID=KEY_ID,
        AWS_SECRET_ACCESS_KEY=SECRET,  # type: ignore[arg-type]
        AWS_SESSION_TOKEN="a/token+==",  # type: ignore[arg-type]
        RESULT_URL_MODE="presigned:60",
        CACHE_DIR=tmp_path,
    )

    url = Storage(settings).result_url(ObjectRef("media", "a"))
    sent = s3_client(settings).client.generate_presigned_url("get_object", {"Bucket": "media", "Key": "a"})

    for each in (url, sent):
        assert dict(parse_qsl(urlsplit(each).query))["X-Amz-Security-Token"] == "a/token+=="


# --- Google


def test_google_s_url_is_signed_in_its_own_dialect(tmp_path: Path) -> None:
    with GoogleStandIn("style_media") as google:
        settings = StoreSettings(
            AWS_STORAGE_BUCKET_NAME="style_media",  # type: ignore[call-arg]
            AWS_S3_ENDPOINT_URL=google.url,
            AWS_ACCESS_KEY_ID=KEY_ID,
            AWS_SECRET_ACCESS_KEY=SECRET,  # type: ignore[arg-type]
            RESULT_URL_MODE="presigned:60",
            CACHE_DIR=tmp_path,
        )
        storage = Storage(settings)
        ref = ObjectRef("style_media", ODD_KEYS[1])
        storage.put(ref, b"a picture", content_type="image/png")

        url = storage.result_url(ref)

        assert dict(parse_qsl(urlsplit(url).query))["X-Goog-Credential"].endswith("/auto/storage/goog4_request")
        assert requests.get(url, timeout=60).content == b"a picture"
        assert requests.get(url.replace("Expires=60", "Expires=61"), timeout=60).status_code == 403


def test_google_s_dialect_differs_in_its_names_alone() -> None:
    url = "https://storage.googleapis.com/style_media/a"
    key = SigningKey(KEY_ID, SECRET)

    google = presigned_url(url, key, seconds=60, at=AWS_EXAMPLE_AT, region="auto", names=GOOGLE)
    aws = presigned_url(url, key, seconds=60, at=AWS_EXAMPLE_AT, region="auto")

    names = [name.removeprefix("X-Goog-") for name, _ in parse_qsl(urlsplit(google).query)]
    assert names == [name.removeprefix("X-Amz-") for name, _ in parse_qsl(urlsplit(aws).query)]
