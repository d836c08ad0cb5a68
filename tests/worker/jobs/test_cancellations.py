"""Cancel orders: what they may say, which jobs they cover, and for how long."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from watermark.signature import SignatureStyle
from worker.jobs.cancellations import MAX_REMEMBERED, REMEMBERED_SECONDS, Cancellations
from worker.messages.cancel import CancelOrder, decode_cancel
from worker.messages.job import Job, Undecodable

TASK = "660f9511-f3ac-52e5-b827-557766551111"
NOW = 1_800_000_000.0


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def job(*, task_id: str = TASK, generation_id: int = 7, created_at: float | None = None) -> Job:
    return Job(
        task_id=task_id,
        generation_id=generation_id,
        prompt="a fox",
        negative_prompt="",
        adapters=(),
        size=None,
        aspect=(1, 1),
        seed=1,
        num_images=1,
        num_inference_steps=8,
        guidance_scale=3.0,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        true_cfg_scale=None,
        scheduler=None,
        signature_ref=None,
        artist_name=None,
        signature_style=SignatureStyle(),
        prompt_tags=(),
        created_at=None if created_at is None else datetime.fromtimestamp(created_at, UTC),
    )


@pytest.mark.parametrize(
    ("body", "order"),
    [
        (b'{"task_id": "660F9511-F3AC-52E5-B827-557766551111"}', CancelOrder(TASK, None)),
        (b'{"generation_id": 7}', CancelOrder(None, 7)),
        (b'{"task_id": "%b", "generation_id": 7}' % TASK.encode(), CancelOrder(TASK, None)),
    ],
)
def test_cancel_order_names_a_task_or_a_generation(body: bytes, order: CancelOrder) -> None:
    assert decode_cancel(body) == order


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 4000,
        b'{"task_id": "../x"}',
        b'{"generation_id": true}',
        b'{"generation_id": "a b"}',
        b'{"a": "' + b"x" * 5000 + b'"}',
        b'{"generation_id": ' + b"9" * 4050 + b"}",
    ],
)
def test_cancel_order_without_an_id_is_refused_with_a_reason(body: bytes) -> None:
    with pytest.raises(Undecodable, match=r"cancel order|UUID"):
        decode_cancel(body)


def test_cancel_covers_its_own_task_and_no_other() -> None:
    cancellations = Cancellations(Clock())
    cancellations.remember(CancelOrder(TASK, None))

    assert cancellations.covers(job())
    assert not cancellations.covers(job(task_id=str(uuid.uuid4())))


def test_cancel_by_generation_covers_jobs_created_before_it_and_not_the_next_try() -> None:
    cancellations = Cancellations(Clock())
    cancellations.remember(CancelOrder(None, 7))

    assert cancellations.covers(job(created_at=NOW - 60))
    assert cancellations.covers(job())
    assert not cancellations.covers(job(created_at=NOW + 1))
    assert not cancellations.covers(job(generation_id=8, created_at=NOW - 60))


@pytest.mark.parametrize(("seconds", "is_covered"), [(-60, True), (1, False)])
def test_a_created_at_without_a_zone_is_compared_as_utc(seconds: int, is_covered: bool) -> None:
    cancellations = Cancellations(Clock())
    cancellations.remember(CancelOrder(None, 7))
    naive = datetime.fromtimestamp(NOW + seconds, UTC).replace(tzinfo=None)

    assert cancellations.covers(replace(job(), created_at=naive)) is is_covered


def test_cancels_are_forgotten_after_an_hour_and_beyond_the_cap() -> None:
    clock = Clock()
    cancellations = Cancellations(clock)
    cancellations.remember(CancelOrder(TASK, None))

    clock.now += REMEMBERED_SECONDS - 1
    assert cancellations.covers(job())
    clock.now += 2
    assert not cancellations.covers(job())

    cancellations.remember(CancelOrder(TASK, None))
    for generation_id in range(MAX_REMEMBERED):
        cancellations.remember(CancelOrder(None, generation_id + 100))
    assert not cancellations.covers(job())
