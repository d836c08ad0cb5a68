"""Ends refused in a row: a wrong address, which costs no more pictures; a single one is its own event's refusal."""

from dataclasses import replace

import pytest

from clients.webhooks import Webhook, WebhookAttempt, WebhookKind, WebhookResult
from tests.worker.results.test_notifier import FAILING, FORBIDDEN, NAMES, TAKEN, Parts, ScriptedClient, complete, failed
from tests.worker.test_breakers import Clock
from worker.breakers import BACKEND_THRESHOLD
from worker.results.address_breaker import (
    ADDRESS_STATUSES,
    REFUSALS_TO_OPEN,
    REST_SECONDS,
    TRIAL_SECONDS,
    AddressBreaker,
)
from worker.results.notifier import MAX_AGE_SECONDS

MANY = 2 * REFUSALS_TO_OPEN
UNKNOWN = WebhookAttempt(WebhookResult.RETRY, 404, None, "HTTP 404", is_ambiguous=False)


class ClientOfTwoAddresses(ScriptedClient):
    """Answers its script to `complete`, and accepts every `failed`, at an address of each kind's own."""

    def send(self, webhook: Webhook, *, deadline_seconds: float) -> WebhookAttempt:
        if webhook.kind is WebhookKind.FAILED:
            return replace(TAKEN, setting="WEBHOOK_FAILED_URL")
        return replace(super().send(webhook, deadline_seconds=deadline_seconds), setting="WEBHOOK_COMPLETE_URL")


def refused(status: int) -> WebhookAttempt:
    return WebhookAttempt(WebhookResult.REJECTED, status, None, f"HTTP {status}", is_ambiguous=False)


def notify_many(parts: Parts, count: int = MANY) -> list[str]:
    return [parts.notifier.notify(complete(f"task-{number}")) for number in range(count)]


@pytest.mark.parametrize("status", [301, 302, 308, 400, 405, 410, 421, 426])
def test_ends_refused_in_a_row_open_the_breaker_and_stop_dead_lettering(status: int) -> None:
    parts = Parts(ScriptedClient(refused(status)))

    ends = notify_many(parts)

    assert ends == ["refused"] * (REFUSALS_TO_OPEN - 1) + ["parked"] * (MANY - REFUSALS_TO_OPEN + 1)
    assert parts.notifier.address_breaker.reason.startswith(f"the backend refuses this worker: HTTP {status} to ")
    assert {kept.queue for kept in parts.publisher.kept[REFUSALS_TO_OPEN - 1 :]} == {NAMES.outbox}


def test_generation_unknown_for_minutes_is_not_dead_lettered_where_all_are_unknown() -> None:
    parts = Parts(ScriptedClient(UNKNOWN))
    assert parts.notifier.is_permanent_failure(UNKNOWN, 61)

    notify_many(parts)

    assert "BACKEND_API_URL" in parts.notifier.address_breaker.reason
    assert not parts.notifier.is_permanent_failure(UNKNOWN, 3600)
    assert parts.notifier.is_permanent_failure(UNKNOWN, MAX_AGE_SECONDS + 1)


def test_accepted_end_resets_the_count() -> None:
    parts = Parts(ScriptedClient(*[*[refused(400)] * (REFUSALS_TO_OPEN - 1), TAKEN] * 3))

    ends = notify_many(parts, 3 * REFUSALS_TO_OPEN)

    assert set(ends) == {"refused", "delivered"}
    assert parts.notifier.address_breaker.reason == ""


def test_end_refused_repeatedly_counts_once() -> None:
    parts = Parts(ScriptedClient(UNKNOWN))

    for _ in range(MANY):
        parts.notifier.send_once(complete("same"))

    assert parts.notifier.address_breaker.reason == ""


@pytest.mark.parametrize("status", [409, 413, 422])
def test_refusal_of_one_event_s_content_does_not_open_the_breaker(status: int) -> None:
    parts = Parts(ScriptedClient(refused(status)))

    assert set(notify_many(parts)) == {"refused"}
    assert parts.notifier.address_breaker.reason == ""


def test_errors_between_refusals_neither_count_nor_reset_the_count() -> None:
    parts = Parts(ScriptedClient(*[refused(400), FAILING, FAILING, FAILING] * MANY))

    notify_many(parts, 4 * MANY)

    assert parts.notifier.address_breaker.is_open()


def test_the_breaker_closes_with_the_first_end_that_is_taken() -> None:
    parts = Parts(ScriptedClient(refused(400)))
    notify_many(parts, REFUSALS_TO_OPEN)
    assert parts.notifier.address_breaker.reason

    parts.client.script = [TAKEN, refused(400)]
    assert parts.notifier.notify(complete("good")) == "delivered"
    assert parts.notifier.address_breaker.reason == ""
    assert parts.notifier.notify(complete("bad")) == "refused"


def test_jobs_are_consumed_for_a_moment_at_intervals_while_the_breaker_is_open() -> None:
    clock = Clock()
    breaker = AddressBreaker(clock)
    for number in range(REFUSALS_TO_OPEN):
        breaker.refuse(f"task-{number}:complete", 404)

    # The old ones, tried again meanwhile, do not put it off
    clock.now += REST_SECONDS - 1
    breaker.refuse("task-0:complete", 404)
    assert breaker.reason
    clock.now += 2
    assert breaker.reason == ""
    assert breaker.is_open()

    # And it ends by itself, or with the next one refused
    clock.now += TRIAL_SECONDS
    assert breaker.reason
    clock.now += REST_SECONDS
    assert breaker.reason == ""
    breaker.refuse("another:complete", 404)
    assert breaker.reason


@pytest.mark.parametrize("status", [405, 410])
def test_address_that_refuses_every_end_opens_the_breaker_while_another_address_accepts_its_own(status: int) -> None:
    parts = Parts(ClientOfTwoAddresses(refused(status)))

    ends = []
    for number in range(MANY):
        ends += notify_many(parts, number + 1)[number:]
        assert parts.notifier.notify(failed(f"other-{number}")) == "delivered"

    assert ends == ["refused"] * (REFUSALS_TO_OPEN - 1) + ["parked"] * (MANY - REFUSALS_TO_OPEN + 1)
    assert f"HTTP {status} to {MANY} ends in a row at WEBHOOK_COMPLETE_URL" in parts.notifier.address_breaker.reason
    parts.client.script = [TAKEN]
    assert parts.notifier.notify(complete()) == "delivered"
    assert parts.notifier.address_breaker.reason == ""


def test_parked_end_is_no_dead_letter_after_another_address_accepted_an_end() -> None:
    parts = Parts(ClientOfTwoAddresses(UNKNOWN))
    notify_many(parts)

    parts.notifier.notify(failed())

    unknown = parts.notifier.send_once(complete())
    assert not parts.notifier.is_permanent_failure(unknown, 3600)
    # At an address that accepts ends it is the event that is unknown.
    assert parts.notifier.is_permanent_failure(replace(UNKNOWN, setting="WEBHOOK_FAILED_URL"), 3600)


def test_two_addresses_that_refuse_every_end_are_both_named_and_share_their_trials() -> None:
    clock = Clock()
    breaker = AddressBreaker(clock)
    for setting in ("WEBHOOK_COMPLETE_URL", "WEBHOOK_FAILED_URL"):
        clock.now += REST_SECONDS / 2
        for number in range(REFUSALS_TO_OPEN):
            breaker.refuse(f"task-{number}:event", 410, setting)

    assert "look at WEBHOOK_COMPLETE_URL" in breaker.reason
    assert "look at WEBHOOK_FAILED_URL" in breaker.reason
    clock.now += REST_SECONDS
    assert breaker.reason == ""
    clock.now += TRIAL_SECONDS
    breaker.accept("WEBHOOK_FAILED_URL")
    assert "WEBHOOK_COMPLETE_URL" in breaker.reason
    assert "WEBHOOK_FAILED_URL" not in breaker.reason


def test_token_that_one_address_refuses_opens_its_breaker_while_another_address_accepts_it() -> None:
    parts = Parts(ClientOfTwoAddresses(FORBIDDEN))

    for number in range(BACKEND_THRESHOLD):
        parts.notifier.send_once(complete(f"task-{number}"))
        parts.notifier.send_once(failed(f"other-{number}"))

    reasons = {setting: breaker.reason for setting, breaker in parts.breakers.items()}
    assert reasons == {
        "WEBHOOK_COMPLETE_URL": "the backend refuses this worker: HTTP 403 at WEBHOOK_COMPLETE_URL",
        "WEBHOOK_FAILED_URL": "",
    }
    parts.client.script = [TAKEN]
    parts.notifier.send_once(complete())
    assert parts.breakers["WEBHOOK_COMPLETE_URL"].reason == ""


def test_refused_token_does_not_count_as_a_wrong_address() -> None:
    assert not ADDRESS_STATUSES & {401, 403}
