"""A message is the same job as another with the same known fields, whatever is written beside them."""

import json
from typing import Any

import pytest

from worker.messages.identity import TaskIdTaken, check_same, fingerprint, own_task_id, with_own_id
from worker.messages.job import JobRejected

TASK = "660f9511-f3ac-52e5-b827-557766551111"
DATA = {"generation_id": 7, "prompt": "a fox", "seed": None, "guidance_scale": 7.5}


def body(data: Any, **beside: Any) -> bytes:
    return json.dumps({"task_id": TASK, "data": data} | beside).encode()


def asked(generation_id: int = 7) -> JobRejected:
    return JobRejected("INVALID_PROMPT", "prompt is empty", task_id=TASK, generation_id=generation_id)


@pytest.mark.parametrize(
    "again",
    [
        body(DATA, created_at="2026-01-01", retries=3),
        body({"guidance_scale": 7.50, "prompt": "a fox", "generation_id": 7}),
        body(DATA | {"attempt": 2, "negative_prompt": None}),
    ],
    ids=["beside", "order", "unknown"],
)
def test_a_message_repeated_with_other_words_around_it_is_the_same_job(again: bytes) -> None:
    assert fingerprint(again) == fingerprint(body(DATA))
    check_same(asked(), again, 7, fingerprint(body(DATA)))


@pytest.mark.parametrize("name", ["prompt", "seed", "lora_path", "parameters"])
def test_message_with_another_value_of_a_known_field_is_logged_as_dropped(
    caplog: pytest.LogCaptureFixture, name: str
) -> None:
    check_same(asked(), body(DATA), 7, fingerprint(body(DATA)))
    assert caplog.messages == []

    check_same(asked(), body(DATA | {name: "other"}), 7, fingerprint(body(DATA)))

    assert caplog.messages == ["message dropped"]


@pytest.mark.parametrize("known", [8, "eight"])
def test_a_task_id_of_another_generation_is_taken(known: object) -> None:
    with pytest.raises(TaskIdTaken, match=TASK):
        check_same(asked(), body(DATA), known, "")


def test_a_record_without_a_fingerprint_is_of_any_data() -> None:
    check_same(asked(), body(DATA), 7, "")


@pytest.mark.parametrize("junk", [b"", b"[" * 9000, b"null", b'{"data": 5}', b"\xff", b"9" * 5000, b"{}" * 200_000])
def test_undecodable_job_has_a_fingerprint_of_its_bytes(junk: bytes) -> None:
    assert fingerprint(junk) == fingerprint(bytes(junk)) != fingerprint(junk + b" ")


def test_any_text_is_an_id_that_another_can_be_made_of() -> None:
    assert own_task_id("no uuid", 7) == own_task_id("no uuid", 7) != own_task_id("no uuid", 8)


def test_an_id_of_its_own_is_the_same_each_time_and_another_for_each_generation() -> None:
    renamed = with_own_id(asked())

    assert isinstance(renamed, JobRejected)
    assert (renamed.task_id, renamed.generation_id) == (own_task_id(TASK, 7), 7)
    assert len({TASK, own_task_id(TASK, 7), own_task_id(TASK, 8)}) == 3
