"""The pure decisions: what an error means, how long to wait, which queues there are, why the GPU is idle."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from clients.storage.errors import ObjectNotFound, StorageError, StorageUnavailable
from clients.webhooks import WebhookAttempt, WebhookKind, WebhookResult
from inference.errors import (
    EngineClosed,
    EngineCrashed,
    EngineError,
    EngineFault,
    EngineStartFailed,
    RequestCancelled,
    RequestFailed,
    ResultTooLarge,
)
from worker.amqp.topology import RETRY_DELAYS_SECONDS, QueueNames
from worker.errors import ErrorCode, JobFailed, JobReleased, PoisonJob
from worker.jobs.disposition import Decision, Disposition, decide
from worker.metrics import Metrics
from worker.monitoring.idle import IdleTimer, idle_reason
from worker.progress.reporter import milestones_between
from worker.results.notifier import MAX_AGE_SECONDS, UNKNOWN_IS_TRANSIENT_SECONDS, delay_after, is_permanent_failure
from worker.results.terminal_event import TerminalEvent, failed_event

# --- What an error means for the job


def tree(base: type[Exception]) -> Iterator[type[Exception]]:
    for child in base.__subclasses__():
        yield child
        yield from tree(child)


def sample(cls: type[Exception]) -> Exception:
    return cls(ErrorCode.FONT_MISSING, "why") if cls in (RequestFailed, JobFailed) else cls("why")


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (
            JobFailed(ErrorCode.LORA_NOT_FOUND, "no such adapter"),
            Decision(Disposition.ACK, ErrorCode.LORA_NOT_FOUND, "no such adapter"),
        ),
        (RequestFailed("GPU_OOM", "too large"), Decision(Disposition.ACK, ErrorCode.GPU_OOM, "too large")),
        (RequestFailed("NSFW_CONTENT", "flagged"), Decision(Disposition.ACK, ErrorCode.NSFW_CONTENT, "flagged")),
        (RequestCancelled(), Decision(Disposition.ACK, ErrorCode.CANCELLED, "the job was cancelled")),
        (EngineCrashed("twice"), Decision(Disposition.DEAD_LETTER, ErrorCode.ENGINE_CRASHED, "twice")),
        (PoisonJob("11 workers"), Decision(Disposition.DEAD_LETTER, ErrorCode.WORKER_CRASHED, "11 workers")),
        (JobReleased("stopping"), Decision(Disposition.RELEASE)),
        (EngineClosed("stopping"), Decision(Disposition.RELEASE)),
    ],
    ids=lambda case: type(case).__name__,
)
@pytest.mark.parametrize("attempt", [1, 5, 100])
def test_unambiguous_errors_have_one_decision_at_any_attempt(
    error: Exception, decision: Decision, attempt: int
) -> None:
    assert decide(error, attempt) == decision


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageUnavailable("S3 is down"), "STORAGE_UNAVAILABLE"),
        (EngineFault("CUDA error"), "ENGINE_ERROR"),
        (KeyError("a bug"), "INTERNAL_ERROR"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_temporary_errors_are_retried_later_and_fail_the_job_once_the_budget_is_spent(
    error: Exception, code: str
) -> None:
    decisions = [decide(error, attempt) for attempt in range(1, 7)]

    assert [decision.code for decision in decisions] == [code] * 6
    assert [(decision.disposition, decision.delay_seconds) for decision in decisions] == [
        (Disposition.RETRY, 30),
        (Disposition.RETRY, 30),
        (Disposition.RETRY, 300),
        (Disposition.RETRY, 300),
        (Disposition.DEAD_LETTER, 0),
        (Disposition.DEAD_LETTER, 0),
    ]


@pytest.mark.parametrize("cls", list(tree(EngineError)), ids=lambda cls: cls.__name__)
def test_no_engine_error_is_taken_for_an_internal_one(cls: type[Exception]) -> None:
    assert decide(sample(cls), 1).code != "INTERNAL_ERROR"


@pytest.mark.parametrize("cls", [StorageError, *tree(StorageError)], ids=lambda cls: cls.__name__)
def test_no_storage_error_is_taken_for_an_internal_one(cls: type[Exception]) -> None:
    assert decide(sample(cls), 1).code == "STORAGE_UNAVAILABLE"


@pytest.mark.parametrize("error", [ResultTooLarge("8 pictures"), MemoryError()], ids=["pixels", "anything"])
def test_a_job_without_room_in_memory_is_tried_once_more_and_then_fails_by_its_size(error: Exception) -> None:
    first, second = decide(error, 1), decide(error, 2)

    assert (first.disposition, first.delay_seconds) == (Disposition.RETRY, RETRY_DELAYS_SECONDS[0])
    assert (second.disposition, second.code) == (Disposition.ACK, "GPU_OOM")
    assert second.message


def test_model_that_cannot_be_loaded_releases_the_job() -> None:
    assert decide(EngineStartFailed("no such folder"), 1) == Decision(Disposition.RELEASE)


def test_the_trees_of_errors_are_not_empty() -> None:
    assert {RequestFailed, EngineClosed, EngineStartFailed} <= set(tree(EngineError))
    assert {ObjectNotFound, StorageUnavailable} <= set(tree(StorageError))


@pytest.mark.parametrize("attempt", [1, 5])
def test_an_unforeseen_error_is_named_but_not_quoted(attempt: int) -> None:
    # Its text may hold anything: a URL, a header, a key.
    message = decide(RuntimeError("canary"), attempt).message

    assert "RuntimeError" in message
    assert "canary" not in message


def test_every_decision_that_fails_a_job_has_a_code_and_a_message() -> None:
    for cls, attempt in itertools.product([*tree(EngineError), *tree(StorageError), KeyError], (1, 5)):
        decision = decide(sample(cls), attempt)
        if decision.disposition is not Disposition.RELEASE:
            assert decision.code.isupper()
            assert decision.message


# --- Telling the backend


def answered(status: int | None, result: WebhookResult = WebhookResult.RETRY) -> WebhookAttempt:
    return WebhookAttempt(result, status, None, f"HTTP {status}", is_ambiguous=False)


def test_the_waits_between_attempts_grow_and_then_stay() -> None:
    assert [delay_after(number, None) for number in range(1, 7)] == [1.0, 5.0, 15.0, 30.0, 30.0, 30.0]


@pytest.mark.parametrize(("num_attempts", "retry_after", "delay"), [(1, 7.0, 7.0), (4, 7.0, 30.0), (1, 0.0, 1.0)])
def test_a_retry_after_lengthens_a_wait_and_never_shortens_it(
    num_attempts: int, retry_after: float, delay: float
) -> None:
    assert delay_after(num_attempts, retry_after) == delay


@pytest.mark.parametrize(
    ("attempt", "age_seconds", "hopeless"),
    [
        (answered(400, WebhookResult.REJECTED), 0.0, True),
        (answered(404), UNKNOWN_IS_TRANSIENT_SECONDS - 1, False),
        (answered(404), UNKNOWN_IS_TRANSIENT_SECONDS + 1, True),
        (answered(500), UNKNOWN_IS_TRANSIENT_SECONDS + 1, False),
        (answered(None), MAX_AGE_SECONDS - 1, False),
        (answered(401), MAX_AGE_SECONDS - 1, False),
        (answered(500), MAX_AGE_SECONDS + 1, True),
        (answered(None), MAX_AGE_SECONDS + 1, True),
    ],
)
def test_an_event_is_given_up_when_it_is_refused_unknown_for_a_minute_or_a_day_old(
    attempt: WebhookAttempt, age_seconds: float, hopeless: bool
) -> None:
    assert is_permanent_failure(attempt, age_seconds) is hopeless


MILESTONES = (0, 25, 50, 75, 90)


@pytest.mark.parametrize(
    ("before", "now", "crossed"),
    [
        (-1.0, 0.0, (0,)),
        (0.0, 0.0, ()),
        (0.0, 24.9, ()),
        (24.9, 25.0, (25,)),
        (25.0, 49.0, ()),
        (20.0, 80.0, (25, 50, 75)),
        (-1.0, 100.0, MILESTONES),
        (90.0, 100.0, ()),
        (80.0, 10.0, ()),
    ],
)
def test_a_step_crosses_the_milestones_behind_the_last_and_up_to_itself(
    before: float, now: float, crossed: tuple[int, ...]
) -> None:
    assert milestones_between(before, now, MILESTONES) == crossed


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 150])
def test_every_milestone_is_crossed_once_in_any_number_of_steps(num_steps: int) -> None:
    percents = [-1.0, *(100 * step / num_steps for step in range(num_steps + 1))]

    crossed = [m for before, now in itertools.pairwise(percents) for m in milestones_between(before, now, MILESTONES)]

    assert crossed == list(MILESTONES)


# --- Queues

NAMES = QueueNames("image_generation")


def test_the_queues_are_named_after_that_of_the_jobs() -> None:
    assert set(NAMES.everything) == {
        "image_generation",
        "image_generation.recover",
        "image_generation.outbox",
        "image_generation.dead",
        "image_generation.lease",
        "image_generation.retry.30",
        "image_generation.retry.300",
    }


def test_the_queue_of_the_jobs_is_declared_as_the_backend_does_without_arguments() -> None:
    assert NAMES.arguments["image_generation"] == {}


def test_our_own_queues_are_quorum_queues() -> None:
    assert {name for name, arguments in NAMES.arguments.items() if arguments.get("x-queue-type") == "quorum"} == set(
        NAMES.everything
    ) - {NAMES.jobs}


@pytest.mark.parametrize("delay_seconds", sorted(set(RETRY_DELAYS_SECONDS)))
def test_each_delay_has_a_queue_that_gives_its_messages_back_and_loses_none(delay_seconds: int) -> None:
    arguments = NAMES.arguments[NAMES.retry(delay_seconds)]

    assert arguments["x-message-ttl"] == delay_seconds * 1000
    assert (arguments["x-dead-letter-exchange"], arguments["x-dead-letter-routing-key"]) == ("", "image_generation")
    assert (arguments["x-dead-letter-strategy"], arguments["x-overflow"]) == ("at-least-once", "reject-publish")


def test_every_delay_of_a_decision_has_its_queue() -> None:
    delays = {decide(KeyError(), attempt).delay_seconds for attempt in range(1, len(RETRY_DELAYS_SECONDS) + 1)}

    assert {NAMES.retry(delay) for delay in delays} <= set(NAMES.everything)


# --- Idleness


@pytest.mark.parametrize(
    ("phases", "is_engine_ready", "is_broker_connected", "reason"),
    [
        ({"denoise"}, True, True, None),
        ({"denoise", "fetch", "decode"}, True, False, None),
        ({"decode", "fetch"}, True, True, "decoding"),
        ({"wait", "fetch"}, True, True, "encoding"),
        ({"encode"}, True, True, "encoding"),
        ({"fetch", "store"}, True, True, "fetching"),
        ({"cut"}, True, True, "fetching"),
        ({"compose"}, True, True, "fetching"),
        ({"ledger", "notify"}, True, False, "fetching"),
        ({"sign", "store", "record", "notify", ""}, True, True, "no_jobs"),
        (set(), True, True, "no_jobs"),
        (set(), True, False, "broker_down"),
        (set(), False, True, "engine_starting"),
        ({"fetch"}, False, False, "engine_starting"),
    ],
)
def test_an_idle_gpu_has_one_reason(
    phases: set[str], is_engine_ready: bool, is_broker_connected: bool, reason: str | None
) -> None:
    found = idle_reason(
        phases=phases, is_engine_ready=is_engine_ready, is_broker_connected=is_broker_connected, is_refused=False
    )

    assert found == reason


def test_a_switch_of_models_is_the_idle_reason_whatever_jobs_do() -> None:
    found = idle_reason(
        phases={"denoise", "wait"},
        is_engine_ready=True,
        is_broker_connected=True,
        is_refused=False,
        is_switching=True,
    )

    assert found == "switching_model"


@pytest.mark.parametrize(
    ("phases", "is_broker_connected", "reason"),
    [(set(), True, "refused"), (set(), False, "broker_down"), ({"fetch"}, True, "fetching"), ({"denoise"}, True, None)],
)
def test_refused_credentials_are_the_idle_reason_without_a_nearer_one(
    phases: set[str], is_broker_connected: bool, reason: str | None
) -> None:
    found = idle_reason(phases=phases, is_engine_ready=True, is_broker_connected=is_broker_connected, is_refused=True)

    assert found == reason


def test_idle_time_goes_to_the_reason_that_held_since_the_last_tick() -> None:
    # Given a watch on a clock of ours
    metrics, moments = Metrics(), iter([100.0, 100.5, 102.5, 110.0, 111.0])
    watch = IdleTimer(metrics, clock=lambda: next(moments))

    # When the GPU waits for jobs, works, and waits for an adapter
    watch.tick("no_jobs")
    watch.tick("no_jobs")
    watch.tick(None)
    watch.tick("fetching")

    # Then the working time is nobody's
    def seconds(reason: str) -> float | None:
        return metrics.registry.get_sample_value("darkroom_idle_seconds_total", {"reason": reason})

    assert (seconds("no_jobs"), seconds("fetching")) == (2.5, 1.0)


# --- The terminal event


COMPLETE = TerminalEvent(
    task_id="660f9511",
    generation_id=456,
    kind=WebhookKind.COMPLETE,
    body={
        "generation_id": 456,
        "result_url": "https://한.example/a.png",
        "metadata": {"seed": 42, "prompt_tags": ["밤"]},
    },
    began_at=1_800_000_000.25,
    stages=(("ledger", 0.0, 0.01), ("denoise", 0.5, 12.25)),
    worker="host:1",
)
FAILED = failed_event(
    task_id="660f9511", generation_id=456, code=ErrorCode.LORA_NOT_FOUND, message="no such adapter", retry_count=2
)


@pytest.mark.parametrize("event", [COMPLETE, FAILED, replace(COMPLETE, is_delivered=True)])
def test_an_event_comes_back_from_its_record_as_it_was(event: TerminalEvent) -> None:
    assert TerminalEvent.from_json(event.to_json()) == event


def test_failed_event_has_the_fields_of_the_contract() -> None:
    assert FAILED.kind is WebhookKind.FAILED
    assert FAILED.body == {
        "generation_id": 456,
        "error_message": "no such adapter",
        "error_code": "LORA_NOT_FOUND",
        "retry_count": 2,
    }


def test_a_webhook_keeps_its_id_and_its_bytes_over_the_record() -> None:
    again = TerminalEvent.from_json(replace(COMPLETE, is_delivered=True).to_json())

    assert again.webhook.webhook_id == COMPLETE.webhook.webhook_id == "660f9511:complete"
    assert json.loads(again.webhook.payload) == json.loads(COMPLETE.webhook.payload)


def test_an_end_with_half_a_surrogate_pair_in_it_can_still_be_recorded() -> None:
    event = replace(FAILED, body={**FAILED.body, "error_message": "tensor '\ud800'"})

    assert TerminalEvent.from_json(event.to_json()) == event


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(COMPLETE.to_json()) | fields).encode()


def test_a_record_of_a_newer_worker_is_read_without_what_it_added() -> None:
    assert TerminalEvent.from_json(changed(shoe_size=43)) == COMPLETE


# Whatever is read as an event can be sent: the outbox has no other check before its lane.
NO_EVENTS = {
    "empty": b"",
    "no json": b"{",
    "no utf-8": b"\xff",
    "list": b"[]",
    "null": b"null",
    "other object": b'{"a": 1}',
    "no body": json.dumps({name: v for name, v in json.loads(COMPLETE.to_json()).items() if name != "body"}).encode(),
    "stages": changed(stages=[1]),
    "nested": b"[" * 100_000,
    "unknown kind": changed(kind="cancelled"),
    "progress": changed(kind="progress"),  # lossy, and never anybody's end
    "body list": changed(body=[1]),
    "body nan": changed(body={"generation_id": float("nan")}),
    "task_id": changed(task_id="two words\r\n"),
}


@pytest.mark.parametrize("content", NO_EVENTS.values(), ids=NO_EVENTS.keys())
def test_invalid_terminal_event_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        TerminalEvent.from_json(content)
