"""Secrets of URLs stay out of every text, and everything else stays in."""

import json
import logging
from urllib.parse import quote

import pytest
from botocore.exceptions import EndpointConnectionError
from hypothesis import given
from hypothesis import strategies as st

from clients.storage.location import LocationForbidden, ObjectRef, parse_location, shown_location
from config.backend import BackendSettings
from config.broker import BrokerSettings
from config.logs import JsonFormatter
from config.redacting import quoted, redacted
from config.section import SettingsError, load_section
from config.store import StoreSettings
from worker.errors import ErrorCode
from worker.results.terminal_event import failed_event

SECRET = "s3cr3tcanary"
PRESIGNED = f"https://media.s3.amazonaws.com/a.png?X-Amz-Credential={SECRET}%2F1&X-Amz-Signature={SECRET}"
HOLDERS = [
    PRESIGNED,
    f"https://storage.googleapis.com/b/k?x-goog-signature={SECRET}",
    f"https://blob.example/c/k?sv=2024-01-01&sig={SECRET}%3D",
    f"https://user:{SECRET}@host/a.png",
    f"https://{SECRET}@host/a.png",
    f"https://user:{SECRET}/x@host:9000/a.png",
    f"amqps://user:{SECRET}@host:5671/%2f?heartbeat=5",
    f"user:{SECRET}@host/a.png",
    f"models/a.safetensors?X-Amz-Security-Token={SECRET}",
    f"https://host/a#access_token={SECRET}",
    f"s3://media/a.png&X-Amz-Signature={SECRET}",
    quote(PRESIGNED, safe=""),
    quote(quote(f"https://user:{SECRET}@host/a?sig={SECRET}", safe=""), safe=""),
]


@pytest.mark.parametrize("text", HOLDERS)
def test_a_secret_is_in_no_text_that_leaves_the_worker(text: str) -> None:
    with pytest.raises(LocationForbidden) as refused:
        parse_location(f"{text}\\", default_bucket="m", allowed_buckets={"m"}, endpoint_url=None, region="r")

    event = failed_event(
        task_id="t", generation_id=1, code=ErrorCode.ENGINE_ERROR, message=f"no {text}: 404", retry_count=0
    )
    for shown in (
        redacted(f'Could not connect to the endpoint URL: "{text}" (403), see {text}'),
        shown_location(text),
        str(refused.value),
        quoted(text),
        event.webhook.payload.decode(),
        event.to_json().decode(),
    ):
        assert SECRET not in shown


@pytest.mark.parametrize("key", [f"a.png?sig={SECRET}", f"x/user:{SECRET}@host/a", f"a.png&X-Amz-Signature={SECRET}"])
def test_an_object_is_shown_without_the_secret_in_its_key_and_named_with_it(key: str) -> None:
    ref = ObjectRef("media", key)

    assert SECRET not in str(ref) + ref.shown_key
    assert ref.uri == f"s3://media/{key}"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Basic"])
def test_credentials_are_in_no_text(scheme: str) -> None:
    assert redacted(f"sent 'Authorization: {scheme} {SECRET}.x-y', got 401") == (
        f"sent 'Authorization: {scheme} …', got 401"
    )


@pytest.mark.parametrize("text", HOLDERS)
def test_a_secret_is_in_no_line_of_the_log(text: str) -> None:
    record = logging.LogRecord("urllib3", logging.WARNING, __file__, 1, "Retrying: %s", (text,), None)
    record.fields = {"reason": f"{text} refused", "long": "x" * 2030 + text}
    error = ValueError(text)
    error.__cause__ = EndpointConnectionError(endpoint_url=text)
    record.exc_info = (ValueError, error, None)

    line = JsonFormatter().format(record)

    assert SECRET not in line
    assert json.loads(line)["exception"].count("Error: ") == 2


@pytest.mark.parametrize(
    "text",
    [
        "no worker takes jobs: is one running?",
        "s3://media/images/logo@2x.png: the store answered 404",
        "http://127.0.0.1:9000/media/logo@2x.png",
        "data.num_inference_steps: Input should be less than or equal to 150 (it is 1000)",
        "a=b, c == d and key=generations/gen-5.png",
        "letter #3 of 7",
        "서울의 밤?",
        "the basic settings, and a bearer of good news",
    ],
)
def test_text_without_secrets_is_kept(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text", ["lucky", "a heron's", "dpm++ 2m sde karras", "9999:1", "Noto Sans CJK KR", "", "5 6", "no\u202epe"]
)
def test_a_short_plain_value_is_quoted(text: str) -> None:
    assert quoted(text) == repr(text)


@pytest.mark.parametrize(
    "text", ["AKIAIOSFODNN7EXAMPLE", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "x" * 41, "a/b", PRESIGNED, "a;b=c"]
)
def test_other_values_are_shown_by_their_length_alone(text: str) -> None:
    assert quoted(text) == f"text of {len(text)} characters"


def test_a_long_value_of_plain_words_is_quoted_by_its_beginning() -> None:
    assert quoted("heron " * 100) == "'heron heron heron heron heron heron…'"
    assert quoted("Bearer eyJhbGciOiJIUzI1NiJ9.e30") == "'Bearer…'"


@given(st.text(max_size=80))
def test_no_text_is_made_longer_or_breaks(text: str) -> None:
    assert len(redacted(text)) <= len(text) + text.count(":") + text.count("=") + text.count("@")
    assert len(quoted(text)) <= 300
    assert "\n" not in shown_location(text)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (BackendSettings, {"BACKEND_API_URL": f"https://user:{SECRET}@host", "INTERNAL_API_TOKEN": f"{SECRET} x"}),
        (StoreSettings, {"AWS_STORAGE_BUCKET_NAME": "media", "AWS_S3_ENDPOINT_URL": f"http://u:{SECRET}@host:x"}),
        (StoreSettings, {"AWS_STORAGE_BUCKET_NAME": "media", "RESULT_URL_BASE": PRESIGNED}),
        (BrokerSettings, {"RABBITMQ_URL": f"http://user:{SECRET}@host"}),
        (BrokerSettings, {"RABBITMQ_URL": f"amqp://user:{SECRET}@host:port"}),
        (BrokerSettings, {"RABBITMQ_PORT": f"amqp://user:{SECRET}@host:5672"}),
    ],
)
def test_a_setting_that_is_refused_is_not_shown_with_its_secret(
    section: type[BackendSettings | StoreSettings | BrokerSettings],
    values: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as refused:
        load_section(section)

    assert SECRET not in str(refused.value)
