"""A body beyond the limit: its ids are found at once or not at all, and nothing in a text is taken for one."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from tests.support.long import IS_LONG
from worker.messages.envelope import MAX_TOKENS, outline_of

MAX_BYTES = 256 * 1024
# Of processor time; a body of 128 MB is the largest that a broker takes.
MAX_SECONDS = 50.0
TASK_ID = "660f9511-f3ac-52e5-b827-557766551111"


def outlined(body: bytes) -> Any:
    return json.loads(outline_of(body, MAX_BYTES))


@pytest.mark.parametrize(
    "prompt",
    ["x" * 300_000, '"generation_id": 6, ' * 20_000, '\\" {[' * 50_000, "한글" * 100_000, "\n\t\b" * 100_000],
    ids=lambda text: repr(text[:8]),
)
@pytest.mark.parametrize("is_first", [True, False], ids=["ids first", "ids last"])
def test_ids_are_found_around_whatever_text(prompt: str, is_first: bool) -> None:
    ids, text = {"generation_id": "u-5"}, {"prompt": prompt, "prompt_tags": [prompt, {"generation_id": 7}]}
    fields = ids | text if is_first else text | ids
    parts = {"task_id": TASK_ID}, {"data": fields}
    body = parts[0] | parts[1] if is_first else parts[1] | parts[0]

    for content in (json.dumps(body), json.dumps(body, ensure_ascii=False, indent=2)):
        found = outlined(b"\xef\xbb\xbf" + content.encode())

        assert (found["task_id"], found["data"]["generation_id"]) == (TASK_ID, "u-5")
        assert found["data"]["prompt"] is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" + b"{}," * 100_000 + b"{}]",
        b'{"data": {"generation_id": 5, "x": "' + b"x" * 300_000,
        b'{"data": {"generation_id": 5, "x": [[[',
        b'{"data": {"generation_id": 5}} {"data": {}}',
        b'{"data": {"generation_id": 5, "x": [' + b"{}," * MAX_TOKENS + b"{}]}}",
        b'{"data": {"generation_id": 5}, "' + b"x" * 2000 + b'": 1}',
        b'{"data": {"generation_id": 5 "x": 1}}',
        b'{"data": {generation_id: 5}}',
        b'{"a": 1,}',
        b'"' + b"\\" * 1001,
        b"\xff\xfe{\x00}\x00",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_body_that_is_not_an_object_has_no_outline(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"[a-z]"):
        outline_of(body, MAX_BYTES)


def test_repeated_name_is_kept_in_the_outline() -> None:
    assert (
        outline_of(b'{"data": {"generation_id": 1, "\\u0067eneration_id": 2}}', MAX_BYTES).count(b"eneration_id") == 2
    )


def test_invalid_id_value_is_left_out() -> None:
    body = b'{"task_id": "' + b"x" * 2000 + b'", "type": ["a"], "data": {"generation_id": {"a": 1}}}'

    assert outlined(body) == {"task_id": None, "type": None, "data": {"generation_id": None}}


@pytest.mark.parametrize(
    "filling", [b'"' + b"x" * 128_000_000 + b'"', b'"' + b"\\\\" * 7_000_000 + b'"', b" " * 16_000_000 + b"1"], ids=len
)
def test_the_largest_bodies_take_little_time(filling: bytes) -> None:
    body = b'{"data": {"generation_id": 5, "prompt": ' + filling + b"}}"
    began_at = time.process_time()

    assert outlined(body)["data"]["generation_id"] == 5
    assert time.process_time() - began_at < MAX_SECONDS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.dictionaries(st.text(max_size=10) | st.sampled_from(["generation_id", "data", "task_id"]), JSON, max_size=5)


@bounded(max_examples=100 if IS_LONG else 50)
@given(FIELDS, FIELDS, st.booleans())
def test_every_json_object_has_an_outline_that_agrees_with_it(
    top: dict[str, Any], data: dict[str, Any], is_ascii: bool
) -> None:
    message = top | {"data": data}
    found = outlined(json.dumps(message, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass"))

    assert found.keys() == message.keys()
    assert found["data"].keys() == data.keys()
    given_id = data.get("generation_id")
    assert found["data"].get("generation_id") == (None if isinstance(given_id, list | dict) else given_id)
