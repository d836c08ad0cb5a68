"""What a job may name, and all it may not."""

import string
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.storage.location import LocationForbidden, ObjectRef, parse_location
from config.store import StoreSettings

ENDPOINT = "https://objects.example.com:9000"
KEY = "models/style-1/lora_weights.safetensors"


def parse(text: str, *, endpoint_url: str | None = ENDPOINT) -> ObjectRef:
    return parse_location(
        text,
        default_bucket="media",
        allowed_buckets={"media", "other.media"},
        endpoint_url=endpoint_url,
        region="eu-west-1",
    )


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"s3://media/{KEY}",
        f"S3://media/{KEY}",
        f"gs://media/{KEY}",
        f"{ENDPOINT}/media/{KEY}",
        f"https://media.objects.example.com:9000/{KEY}",
        f"HTTPS://Media.Objects.example.com:9000/{KEY}",
        f"https://media.s3.eu-west-1.amazonaws.com/{KEY}",
        f"https://media.s3.amazonaws.com/{KEY}",
        f"https://s3.eu-west-1.amazonaws.com/media/{KEY}",
        f"https://s3.amazonaws.com/media/{KEY}",
        f"https://s3.amazonaws.com/media/{KEY.replace('s', '%73')}",
    ],
)
def test_every_form_names_the_same_object(text: str) -> None:
    assert parse(text) == ObjectRef("media", KEY)


def test_an_endpoint_may_have_a_path() -> None:
    ref = parse("http://store.example/s3/media/a.png", endpoint_url="http://store.example/s3")

    assert ref == ObjectRef("media", "a.png")


def test_a_bucket_with_dots_keeps_them() -> None:
    assert parse("https://other.media.s3.amazonaws.com/a.png") == ObjectRef("other.media", "a.png")


@pytest.mark.parametrize("bucket", ["style_media", "Legacy_Bucket", "a.b.c" + ".d" * 60])
def test_a_bucket_that_the_settings_take_may_be_named_by_jobs(bucket: str) -> None:
    assert StoreSettings(AWS_STORAGE_BUCKET_NAME=bucket, ALLOWED_BUCKETS=bucket).allowed_buckets == {bucket}
    for text in ("a.png", f"s3://{bucket}/a.png", f"gs://{bucket}/a.png", f"{ENDPOINT}/{bucket}/a.png"):
        ref = parse_location(
            text, default_bucket=bucket, allowed_buckets={bucket}, endpoint_url=ENDPOINT, region="eu-west-1"
        )
        assert ref == ObjectRef(bucket, "a.png")


def test_a_trailing_slash_names_a_folder() -> None:
    folder = parse("s3://media/models/style-1/")

    assert folder.key.endswith("/")
    assert folder.child("adapter_config.json") == parse("models/style-1/adapter_config.json")
    assert ObjectRef("media", "models/style-1").child("a") == folder.child("a")
    assert not parse(KEY).key.endswith("/")


def test_a_key_outside_https_is_taken_as_it_is() -> None:
    assert parse("s3://media/100% wool?.png").key == "100% wool?.png"


def test_a_percent_sign_in_an_https_form_is_decoded_once() -> None:
    assert parse(f"{ENDPOINT}/media/%ED%95%9C%20100%25.png").key == "한 100%.png"


def test_the_location_prints_as_an_s3_url() -> None:
    assert str(parse(KEY)) == f"s3://media/{KEY}"


FORBIDDEN = [
    "",
    "/etc/passwd",
    "~/secret",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    "ftp://media/a",
    "C:/a",
    "javascript:alert(1)",
    "\\\\host\\share",
    "models\\a",
    "..",
    ".",
    "../../other/secret",
    "a/../b",
    "a/./b",
    "a//b",
    "a//",
    "/",
    "s3://media",
    "s3://media/",
    "s3://media//a",
    "s3://media/../other/secret",
    "s3:///a",
    "s3://",
    "a\0b",
    "a\r\nHost: evil",
    "a\x7fb",
    "a\u2028b",
    "a\ud800b",
    "%2e%2e/secret",
    "s3://media/%2E%2E/secret",
    "s3://media/a%2fb",
    f"{ENDPOINT}/media/%2e%2e/secret",
    f"{ENDPOINT}/media/%2e/a",
    f"{ENDPOINT}/media/a%2f..%2fb",
    f"{ENDPOINT}/media/%252e%252e/secret",
    f"{ENDPOINT}/media/a%5cb",
    f"{ENDPOINT}/media/a%00b",
    f"{ENDPOINT}/media/a%0d%0ab",
    f"{ENDPOINT}/media/a%ffb",
    f"{ENDPOINT}/media/a?versionId=1",
    f"{ENDPOINT}/media/a#b",
    f"{ENDPOINT}/secret/a",
    f"{ENDPOINT}/",
    ENDPOINT,
    "http://objects.example.com:9000/media/a",
    "https://objects.example.com/media/a",
    "https://objects.example.com:9000@evil.example/media/a",
    "https://user:pw@objects.example.com:9000/media/a",
    "https://evil.example/media/a",
    "https://evilobjects.example.com:9000/media/a",
    "https://objects.example.com:9000.evil.example/media/a",
    "http://127.0.0.1:1\\@objects.example.com/media/a",
    "http://169.254.169.254/latest/meta-data",
    "http://media.s3.amazonaws.com/a",
    "https://media.s3.us-east-1.amazonaws.com/a",
    "https://evil.media.s3.amazonaws.com/a",
    "https://s3.amazonaws.com.evil.example/media/a",
    "s3://secret/a",
    "s3://Media/a",
    "gs://media@evil/a",
    "s3://me/a",
    "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/a",
    "arn:aws:s3:::media/a",
    "a" * 1025,
    "한" * 342,
    f"{ENDPOINT}/media/" + "a" * 5000,
]


@pytest.mark.parametrize("text", FORBIDDEN, ids=[ascii(text)[:60] for text in FORBIDDEN])
def test_location_of_any_other_form_is_forbidden(text: str) -> None:
    with pytest.raises(LocationForbidden):
        parse(text)


def test_an_arn_is_forbidden_even_as_an_allowed_bucket() -> None:
    arn = "arn:aws:s3:us-west-2:123456789012:accesspoint"

    with pytest.raises(LocationForbidden):
        parse_location(f"s3://{arn}/a", default_bucket=arn, allowed_buckets={arn}, endpoint_url=None, region="x")


def test_endpoint_defaults_to_aws() -> None:
    with pytest.raises(LocationForbidden):
        parse(f"{ENDPOINT}/media/{KEY}", endpoint_url=None)


def test_message_quotes_the_value_short_and_escaped_with_the_right_form() -> None:
    with pytest.raises(LocationForbidden) as raised:
        parse("/etc/" + "x" * 3000 + "\r\n")

    shown, message = str(raised.value).split("…")[0], str(raised.value)
    assert shown.startswith("'/etc/xxx")
    assert len(shown) < 120
    assert "\n" not in message
    assert "control characters" in message


segments = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="/\\"),
    min_size=1,
    max_size=20,
).filter(lambda text: text not in (".", "..") and not any(code in text.lower() for code in ("%2e", "%2f", "%5c")))


@given(st.lists(segments, min_size=1, max_size=5).map("/".join))
def test_a_sound_key_survives_its_https_form(key: str) -> None:
    assert parse(f"{ENDPOINT}/media/{quote(key)}").key == key


@given(st.text(st.sampled_from(string.ascii_lowercase + "./%2eEfF5c:@?#\\\0\n ~s3htp한"), max_size=60))
def test_no_text_escapes_its_bucket(text: str) -> None:
    try:
        ref = parse(text)
    except LocationForbidden:
        return

    assert ref.bucket in ("media", "other.media")
    assert not {"", ".", ".."} & set(ref.key.removesuffix("/").split("/"))
    assert not set(ref.key) & set("\\\0\n")
