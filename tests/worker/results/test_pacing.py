"""Turns of parked events: none waits for those that the backend never takes, and one that is down is left alone."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from clients.webhooks import WebhookAttempt, WebhookKind, WebhookResult
from worker.amqp.delivery import Delivery
from worker.results.pacing import FAILURES_BEFORE_PAUSE, SLOW_SECONDS, Pacing, ParkedEvent
from worker.results.terminal_event import TerminalEvent

A_MINUTE = 60.0
ANSWER_SECONDS, HANG_SECONDS = 0.05, 20.0

TAKEN = WebhookAttempt(WebhookResult.DELIVERED, 200, None, "HTTP 200", is_ambiguous=False)
REFUSED_CONNECTION = WebhookAttempt(WebhookResult.RETRY, None, None, "no connection", is_ambiguous=False)
FAILURES = {
    "500": WebhookAttempt(WebhookResult.RETRY, 500, None, "HTTP 500", is_ambiguous=False),
    "404": WebhookAttempt(WebhookResult.RETRY, 404, None, "HTTP 404", is_ambiguous=False),
    "503 and a pause of an hour": WebhookAttempt(WebhookResult.RETRY, 503, 3600.0, "HTTP 503", is_ambiguous=False),
    "a reset": WebhookAttempt(WebhookResult.RETRY, None, None, "the connection broke", is_ambiguous=True),
    "silence": WebhookAttempt(WebhookResult.RETRY, None, None, "no answer within 20 s", is_ambiguous=True),
}


def parked(name: str) -> ParkedEvent:
    event = TerminalEvent(name, 1, WebhookKind.COMPLETE, {"generation_id": 1})
    delivery = Delivery(
        body=b"",
        queue="outbox",
        is_redelivered=False,
        attempt=2,
        num_deliveries=0,
        since=0.0,
        session=1,
        tag=1,
        channel_number=1,
    )
    return ParkedEvent(event, delivery, 2)


@dataclass
class Lane:
    """A lane with one call at a time, by a clock of its own. `answer` says what the backend makes of an event now."""

    answer: Callable[[str, float], WebhookAttempt]
    now: float = 1e9
    pacing: Pacing = field(default_factory=Pacing)
    parked: list[ParkedEvent] = field(default_factory=list)
    delivered_at: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[str, float]] = field(default_factory=list)

    def add(self, *names: str) -> None:
        self.parked += [parked(name) for name in names]

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            first = self.pacing.choose_next(self.parked, [], self.now)
            if first is None:
                self.now = min(end, max(self.now, self.pacing.next_call_at, self._next_due()) + 0.001)
            else:
                self._call(first)

    def _next_due(self) -> float:
        return min((one.due_at for one in self.parked), default=float("inf"))

    def _call(self, one: ParkedEvent) -> None:
        name = one.event.task_id
        attempt = self.answer(name, self.now)
        self.calls.append((name, self.now))
        self.now += HANG_SECONDS if "no answer" in attempt.reason else ANSWER_SECONDS
        if attempt is TAKEN:
            self.delivered_at[name] = self.now
            self.parked.remove(one)
            self.pacing.record_success()
            self._let_through(one, is_accepting=True)
        else:
            is_back = self.pacing.record_failure(one, attempt, self.now, num_parked=len(self.parked))
            one.record_failure(attempt, self.now)
            if is_back:
                self._let_through(one, is_accepting=False)

    def _let_through(self, called: ParkedEvent, *, is_accepting: bool) -> None:
        for other in self.parked:
            if other is not called:
                other.make_due(is_accepting=is_accepting)


def names(kind: str, count: int) -> list[str]:
    return [f"{kind} {number}" for number in range(count)]


OUTAGE_SECONDS = 200.0


def after_an_outage(
    bad: WebhookAttempt, num_bad: int, num_good: int, outage: WebhookAttempt, *, are_known: bool
) -> Lane:
    """Simulate a minute after the backend's return; the bad events were parked before the outage where `are_known`."""
    outage_at, back_at = 1e9 + 100, 1e9 + 100 + OUTAGE_SECONDS

    def answer(name: str, now: float) -> WebhookAttempt:
        if outage_at <= now < back_at:
            return outage
        return bad if name.startswith("bad") else TAKEN

    lane = Lane(answer)
    if are_known:
        lane.add(*names("bad", num_bad), "first", "second")
    lane.run(outage_at - lane.now)
    lane.now = max(lane.now, outage_at)
    if not are_known:
        lane.add(*names("bad", num_bad))
    lane.add(*names("good", num_good))
    lane.run(back_at - lane.now)
    lane.run(back_at + A_MINUTE - lane.now)
    return lane


RATIOS = [(1, 1), (3, 1), (3, 2), (3, 50), (1, 199), (50, 50), (50, 1)]
OUTAGES = {
    "no connection": REFUSED_CONNECTION,
    "502 to all": WebhookAttempt(WebhookResult.RETRY, 502, None, "HTTP 502", False),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
@pytest.mark.parametrize(("num_bad", "num_good"), RATIOS[:-1])
@pytest.mark.parametrize("kind", ["500", "404", "503 and a pause of an hour", "a reset"])
def test_events_after_an_outage_are_delivered_within_a_minute_beside_known_failures(
    kind: str, num_bad: int, num_good: int, outage: WebhookAttempt
) -> None:
    random.seed(f"{kind} {num_bad} {num_good}")

    lane = after_an_outage(FAILURES[kind], num_bad, num_good, outage, are_known=True)

    assert {name for name in lane.delivered_at if name.startswith("good")} == set(names("good", num_good))


@pytest.mark.parametrize(("num_bad", "num_good"), RATIOS)
@pytest.mark.parametrize("kind", ["500", "404", "503 and a pause of an hour", "a reset"])
def test_events_after_an_outage_are_delivered_within_a_minute_beside_failures_parked_in_it(
    kind: str, num_bad: int, num_good: int
) -> None:
    random.seed(f"{kind} {num_bad} {num_good}")

    lane = after_an_outage(FAILURES[kind], num_bad, num_good, REFUSED_CONNECTION, are_known=False)

    assert {name for name in lane.delivered_at if name.startswith("good")} == set(names("good", num_good))


def test_two_events_that_time_out_cost_the_others_two_calls() -> None:
    random.seed("silence")
    lane = after_an_outage(FAILURES["silence"], 2, 5, REFUSED_CONNECTION, are_known=False)
    lane.run(2 * HANG_SECONDS)

    assert len([name for name in lane.delivered_at if name.startswith("good")]) == 5


def test_second_call_begins_beside_an_unanswered_one() -> None:
    pacing, silent, other = Pacing(), parked("silent"), parked("other")
    silent.sent_at = now = time.monotonic()

    assert pacing.choose_next([other], [silent], now + SLOW_SECONDS - 0.1) is None
    assert pacing.seconds_to_wait([other], [silent], now, at_most=60) == pytest.approx(SLOW_SECONDS)
    assert pacing.choose_next([other], [silent], now + SLOW_SECONDS + 0.1) is other
    assert pacing.choose_next([other], [silent] * FAILURES_BEFORE_PAUSE, now + 3600) is None


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_new_event_beside_a_known_failure_is_sent_at_once(failure: WebhookAttempt) -> None:
    lane = Lane(lambda name, _now: TAKEN if name.startswith("good") else failure)
    lane.add("good 0", "bad", "good 1", "good 2")
    lane.run(600)

    began_at = lane.now
    lane.add("good 9")
    lane.run(A_MINUTE)

    assert lane.delivered_at["good 9"] - began_at < 1


@pytest.mark.parametrize("num_parked", [1, 5, 200])
def test_backend_without_a_connection_is_tried_with_one_event_each_half_minute(num_parked: int) -> None:
    lane = Lane(lambda _name, _now: REFUSED_CONNECTION)
    lane.add(*names("good", num_parked))
    lane.run(120)
    lane.calls.clear()

    lane.run(600)

    assert 600 / 36 - 2 <= len(lane.calls) <= 600 / 30 + 1


def test_backend_that_fails_all_is_tried_with_a_few_events_each_half_minute() -> None:
    lane = Lane(lambda _name, _now: FAILURES["500"])
    lane.add(*names("good", 40))
    lane.run(120)
    lane.calls.clear()

    lane.run(600)

    assert len(lane.calls) <= 4 * (600 / 30 + 1)
    assert {name for name, _ in lane.calls} == set(names("good", 40))


def test_known_failure_is_retried_ever_more_rarely_whatever_is_taken_beside_it() -> None:
    lane = Lane(lambda name, _now: TAKEN if name.startswith("good") else FAILURES["500"])
    lane.add("bad")
    for number in range(3600):
        lane.add(f"good {number}")
        lane.run(1)

    assert sum(name == "bad" for name, _ in lane.calls) <= 25
    assert len(lane.delivered_at) == 3600
