"""The engine behind its process boundary: ready, many at once, cancelled, crashed, hung, sick, closed."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import inference.process.health
from config.model import ModelSettings
from inference.errors import EngineClosed, EngineCrashed, EngineFault, EngineHung, RequestCancelled, RequestFailed
from inference.process.child import EXIT_BROKEN
from inference.process.child_handle import ChildHandle
from inference.process.engine_process import EngineProcess, EngineState, wait_until_ready
from inference.process.health import MAX_CONSECUTIVE_CRASHES, MAX_CONSECUTIVE_FAULTS, ChildHealth
from inference.request import Control, EngineLoad, GenerationResult, Source, StepReport
from tests.support.engine.engine_requests import request_of
from tests.support.engine.fake_child import EXIT_POISONED, NUM_SLOTS
from tests.support.engine.forked_child import fork_fake
from tests.support.long import long
from tests.support.paths import DEMO_MODEL, ROOT
from tests.support.world import HANG_SECONDS, eventually
from worker.metrics import Metrics

IMAGE_BYTES = 4_000_000  # many times what the pipe holds
# Steps of the fake engine, 5 ms each: still there when something happens in the first few.
LONG = 40


def ignore(_report: StepReport) -> None:
    pass


def never() -> bool:
    return False


# --- The real child and the demo model. The short form has it in the workers of `tests/live/drawing`


@pytest.fixture(scope="module")
def engines() -> Iterator[list[EngineProcess]]:
    """Collect the engines that the tests of this module start; torch takes each five seconds to import."""
    made: list[EngineProcess] = []
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def engine(engines: list[EngineProcess]) -> EngineProcess:
    """Return the running engine, or a new one where a test has closed it."""
    if not engines or engines[-1].state is EngineState.CLOSED:
        engines.append(ready_engine())
    return engines[-1]


def ready_engine(min_hang_seconds: float = 60.0) -> EngineProcess:
    settings = ModelSettings(MODEL_ID=str(DEMO_MODEL / "checkpoint"))
    engine = EngineProcess(settings, log_level="INFO", on_restart=lambda: None, min_hang_seconds=min_hang_seconds)
    engine.start()
    wait_until_ready(engine, HANG_SECONDS)
    return engine


@long
def test_ready_engine_reports_its_facts(engine: EngineProcess) -> None:
    facts = engine.facts

    assert facts is not None
    assert (facts.model, facts.family, facts.base_size, facts.size_multiple) == (
        "checkpoint",
        "stable-diffusion",
        128,
        8,
    )
    assert facts.step_seconds > 0


@long
def test_a_request_becomes_its_image_with_its_steps_and_stages(engine: EngineProcess) -> None:
    reports: list[StepReport] = []

    result = engine.generate(request_of(seeds=(1, 2)), reports.append, never).result()

    assert [(one.seed, len(one.rgb)) for one in result.images] == [(1, 128 * 128 * 3), (2, 128 * 128 * 3)]
    assert [report.step_index for report in reports] == list(range(9))
    assert [stage.name for stage in result.stages] == ["adapt", "encode", "denoise", "decode"]
    assert all(stage.started_at <= time.monotonic() for stage in result.stages)


@long
def test_a_failure_crosses_the_boundary_with_its_code(engine: EngineProcess) -> None:
    with pytest.raises(RequestFailed, match="dpm") as failure:
        engine.generate(request_of(scheduler="magic"), ignore, never).result()

    assert failure.value.code == "INVALID_INPUT"


@long
def test_a_cancelled_request_ends_within_two_steps_and_the_next_one_runs(engine: EngineProcess) -> None:
    reports: list[StepReport] = []

    cancelled = engine.generate(request_of(num_inference_steps=100), reports.append, lambda: len(reports) > 5)

    with pytest.raises(RequestCancelled):
        cancelled.result()
    assert len(reports) <= 8
    assert len(engine.generate(request_of(), ignore, never).result().images) == 1


@long
def test_a_waiting_request_can_be_withdrawn_and_a_running_one_cannot(engine: EngineProcess) -> None:
    reports: list[StepReport] = []
    all_lanes = tuple(range(ModelSettings().max_concurrent_generations))
    running = engine.generate(
        request_of(request_id="running", seeds=all_lanes, num_inference_steps=4), reports.append, never
    )
    waiting = engine.generate(request_of(request_id="waiting", arrived_at=1.0), ignore, never)
    eventually(lambda: len(reports) > 0)

    assert waiting.cancel()
    assert not running.cancel()

    assert len(running.result().images) == len(all_lanes)
    with pytest.raises(CancelledError):
        waiting.result()


@long
def test_an_engine_that_falls_silent_is_killed_and_the_request_drawn_by_the_next() -> None:
    engine = ready_engine(min_hang_seconds=2.0)
    hung = engine.pid

    def stop(report: StepReport) -> None:
        if report.step_index == 2 and engine.pid == hung:
            assert hung is not None
            os.kill(hung, signal.SIGSTOP)

    drawn_again = engine.generate(request_of(num_inference_steps=60), stop, never)
    assert len(drawn_again.result().images) == 1
    assert engine.pid != hung
    engine.close()


@long
def test_closing_ends_a_running_request_and_leaves_no_process(engine: EngineProcess) -> None:
    reports: list[StepReport] = []
    running = engine.generate(request_of(num_inference_steps=150, seeds=(1, 2, 3, 4)), reports.append, never)
    eventually(lambda: len(reports) > 1)
    pid = engine.pid

    engine.close()

    with pytest.raises(EngineClosed):
        running.result()
    assert engine.state is EngineState.CLOSED
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(EngineClosed):
        engine.generate(request_of(), ignore, never)


# --- The same process boundary around an engine that obeys its prompts: see tests/support/engine/fake_child.py


def spawn_fake(settings: ModelSettings) -> ChildHandle:
    """Start a fake child as the real one is started; those of most tests are forked, which takes a tenth of it."""
    return ChildHandle.spawn(settings, module="tests.support.engine.fake_child")


@dataclass
class Fake:
    """An engine with fake children, and what was seen of them. Requests are named, and asked for in their order."""

    journal: Path
    engine: EngineProcess
    restarts: list[None]
    engine_loads: list[EngineLoad]
    steps: dict[str, list[int]] = field(default_factory=dict)
    futures: dict[str, Future[GenerationResult]] = field(default_factory=dict)

    def ask(
        self, name: str, prompt: str = "", *, is_cancelled: Callable[[], bool] = never, **fields: Any
    ) -> Future[GenerationResult]:
        steps = self.steps.setdefault(name, [])
        fields = {"num_inference_steps": LONG, "arrived_at": float(len(self.futures))} | fields
        request = request_of(request_id=name, prompt=prompt, **fields)
        self.futures[name] = self.engine.generate(request, lambda report: steps.append(report.step_index), is_cancelled)
        return self.futures[name]

    def outcomes(self) -> dict[str, type[BaseException] | None]:
        """Return how each request ended; None where it was drawn."""
        found = {name: future.exception(HANG_SECONDS) for name, future in self.futures.items()}
        return {name: error and type(error) for name, error in found.items()}

    def lives(self) -> list[list[str]]:
        """Return the journal of each child in turn: `generate a`, `begin a`, `end a` …"""
        lives: dict[str, list[str]] = {}
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        for line in lines:
            pid, _, event = line.partition(" ")
            lives.setdefault(pid, []).append(event)
        return list(lives.values())

    def asked(self, life: int) -> str:
        """Return the names of the requests that a child was sent, in their order; none where there was no such
        child.
        """
        return "".join(names("generate", events) for events in self.lives()[life : life + 1])

    def all_asked(self) -> Counter[str]:
        return Counter(name for life in range(len(self.lives())) for name in self.asked(life))


def names(event: str, life: list[str]) -> str:
    return "".join(line.split()[1] for line in life if line.startswith(f"{event} "))


@pytest.fixture
def new_fake(tmp_path: Path) -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def new(*, min_hang_seconds: float = 60.0, **settings: Any) -> Fake:
        """Start a fake engine; requests submitted at once wait for the child to be ready, and are sent together."""
        journal = tmp_path / f"journal-{len(made)}"
        restarts: list[None] = []
        engine_loads: list[EngineLoad] = []
        engine = EngineProcess(
            ModelSettings(MODEL_ID=str(journal), **settings),
            log_level="INFO",
            on_restart=lambda: restarts.append(None),
            on_load_report=engine_loads.append,
            min_hang_seconds=min_hang_seconds,
            spawn=fork_fake,
        )
        fake = Fake(journal, engine, restarts, engine_loads)
        made.append(fake)
        engine.start()
        return fake

    yield new
    for fake in made:
        fake.engine.close()


@pytest.fixture
def fake(new_fake: Callable[..., Fake]) -> Fake:
    return new_fake()


def drawn(*names: str) -> dict[str, type[BaseException] | None]:
    return dict.fromkeys(names)


# --- Many at once


def test_many_requests_are_drawn_together_each_with_its_own_steps_and_images(fake: Fake) -> None:
    for number, name in enumerate("abcdefghij"):
        fake.ask(name, num_inference_steps=3 + number, seeds=(number, 100 + number))

    results = {name: future.result(HANG_SECONDS) for name, future in fake.futures.items()}

    for number, name in enumerate("abcdefghij"):
        assert [image.seed for image in results[name].images] == [number, 100 + number]
        assert fake.steps[name] == list(range(3 + number + 1))
    (life,) = fake.lives()
    assert names("begin", life[: life.index("end a")]) == "abcdefghij"


def test_a_request_joins_those_that_are_being_drawn(fake: Fake) -> None:
    fake.ask("a", num_inference_steps=100)
    eventually(lambda: len(fake.steps["a"]) > 2)

    fake.ask("b", num_inference_steps=5).result(HANG_SECONDS)

    assert not fake.futures["a"].done()
    assert fake.outcomes() == drawn("a", "b")


def test_waiting_requests_are_sent_the_oldest_first(fake: Fake) -> None:
    for name, arrived_at in (("c", 3.0), ("a", 1.0), ("d", 4.0), ("b", 2.0)):
        fake.ask(name, arrived_at=arrived_at, num_inference_steps=2)

    assert fake.outcomes() == drawn("a", "b", "c", "d")
    assert fake.asked(0) == "abcd"


def test_all_steps_of_a_request_come_before_its_end_and_in_order(fake: Fake) -> None:
    seen: list[Any] = []
    fake.engine.generate(
        request_of(num_inference_steps=20), lambda report: seen.append(report.step_index), never
    ).add_done_callback(lambda _: seen.append("end"))

    eventually(lambda: "end" in seen)

    assert seen == [*range(21), "end"]


def test_every_forward_is_counted_once_and_the_gauges_follow(fake: Fake) -> None:
    metrics = Metrics()
    fake.ask("a", num_inference_steps=10)
    fake.ask("b", num_inference_steps=30)
    assert fake.outcomes() == drawn("a", "b")
    eventually(lambda: fake.engine_loads[-1].num_lanes == 0)
    for engine_load in fake.engine_loads:
        metrics.note_engine_load(engine_load)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"darkroom_{name}", labels)

    # The two may begin a turn apart; the warm-up of the fake is not among them.
    assert value("denoise_lane_steps_total") == 40
    assert 30 <= (value("denoise_steps_total") or 0) <= 31
    assert (value("lanes"), value("adapter_slots", state="active")) == (0, 0)
    assert (value("adapter_slots", state="idle"), value("adapter_slots", state="free")) == (1, NUM_SLOTS - 1)
    assert max(engine_load.num_lanes for engine_load in fake.engine_loads) == 2


def test_failure_of_one_request_leaves_the_others(fake: Fake) -> None:
    fake.ask("a", "fail@2")
    fake.ask("b", "fault@2")
    fake.ask("c")
    fake.ask("d", "refuse")

    assert fake.outcomes() == {"a": RequestFailed, "b": EngineFault, "c": None, "d": EngineFault}
    assert "ZeroDivisionError: a fault" in str(fake.futures["b"].exception())
    assert "FileNotFoundError: no adapter there" in str(fake.futures["d"].exception())
    assert len(fake.lives()) == 1


# --- Cancelled


def test_cancelling_one_of_several_leaves_the_others(fake: Fake) -> None:
    for name in "abc":
        steps = fake.steps.setdefault(name, [])
        is_cancelled = (lambda steps=steps: len(steps) > 5) if name == "b" else never
        fake.ask(name, num_inference_steps=100, is_cancelled=is_cancelled)

    assert fake.outcomes() == {"a": None, "b": RequestCancelled, "c": None}
    assert len(fake.steps["b"]) < 20


def test_a_request_can_be_withdrawn_until_its_first_step_wherever_it_waits(new_fake: Callable[..., Fake]) -> None:
    # Given one lane, one request in it, and two inside the child behind it
    fake = new_fake(MAX_CONCURRENT_GENERATIONS=1)
    fake.ask("a", num_inference_steps=60)
    fake.ask("b")
    fake.ask("c", num_inference_steps=5)
    eventually(lambda: len(fake.steps["a"]) > 2)
    assert fake.asked(0) == "abc"

    # When the first of those is withdrawn
    assert not fake.futures["a"].cancel()
    assert fake.futures["b"].cancel()

    # Then it is never begun, and the lane goes to the one behind it
    for name in "ac":
        fake.futures[name].result(HANG_SECONDS)
    (life,) = fake.lives()
    assert (names("begin", life), fake.steps["b"]) == ("ac", [])
    with pytest.raises(CancelledError):
        fake.futures["b"].result()


def test_request_waiting_in_the_child_is_withdrawn_by_its_future_too(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake(MAX_CONCURRENT_GENERATIONS=1)
    cancelled = threading.Event()
    fake.ask("a", num_inference_steps=100)
    fake.ask("b", is_cancelled=cancelled.is_set)
    eventually(lambda: len(fake.steps["a"]) > 2)

    cancelled.set()

    assert isinstance(fake.futures["b"].exception(HANG_SECONDS), RequestCancelled)
    assert not fake.futures["a"].done()
    assert fake.outcomes()["a"] is None
    assert names("begin", fake.lives()[0]) == "a"


def test_request_cancelled_before_it_is_sent_never_reaches_the_child(fake: Fake) -> None:
    fake.ask("a")
    fake.ask("b").cancel()
    fake.ask("c", is_cancelled=lambda: True)

    assert isinstance(fake.futures["c"].exception(HANG_SECONDS), RequestCancelled)
    fake.futures["a"].result(HANG_SECONDS)

    assert fake.asked(0) == "a"
    assert fake.futures["b"].cancelled()


def test_request_withdrawn_as_it_finishes_has_no_effect(fake: Fake) -> None:
    # The report of the only step and the end come in one breath: cancelling meets every moment of it.
    for number in range(60):
        future = fake.ask(str(number), num_inference_steps=1)
        if number == 0:
            future.result(HANG_SECONDS)
        time.sleep(number * 0.0002)
        future.cancel()

    fake.ask("last").result(HANG_SECONDS)

    assert all(future.done() for future in fake.futures.values())
    assert fake.engine.state is EngineState.READY
    assert len(fake.lives()) == 1


# --- Crashed


INNOCENT = "abcdefghi"


@pytest.mark.parametrize("place", [0, 4, 9], ids=["oldest", "amid", "newest"])
def test_poison_among_nine_others_is_found_with_three_processes_and_fails_alone(fake: Fake, place: int) -> None:
    for number, name in enumerate(INNOCENT[:place] + "P" + INNOCENT[place:]):
        fake.ask(name, "poison@3" if name == "P" else "", arrived_at=float(number))

    assert fake.outcomes() == drawn(*INNOCENT) | {"P": EngineCrashed}

    # The crash of all, the newer ones tried alone behind it, the poison's two tries, and the older ones together
    older, newer = INNOCENT[:place], INNOCENT[place:][::-1]
    assert len(fake.restarts) == 3
    assert [fake.asked(life) for life in range(4)] == [older + "P" + newer[::-1], newer + "P", "P", older]
    assert str(EXIT_POISONED) in str(fake.futures["P"].exception())


def test_suspects_are_alone_in_the_child(fake: Fake) -> None:
    for name, prompt in (("P", "poison@3"), ("a", ""), ("b", ""), ("c", "")):
        fake.ask(name, prompt, num_inference_steps=10)
    eventually(lambda: len(fake.lives()) > 1)
    fake.ask("d")

    assert fake.outcomes() == drawn("a", "b", "c", "d") | {"P": EngineCrashed}

    tries = [line for line in fake.lives()[1] if not line.startswith("start")]
    in_turn = [f"{event} {name}" for name in "cba" for event in ("generate", "begin", "end")]
    assert tries == [*in_turn, "generate P", "begin P"]
    assert fake.asked(3) == "d"


def test_two_poison_requests_are_convicted_one_after_the_other(fake: Fake) -> None:
    for name in "PabcdefghQ":
        fake.ask(name, "poison@3" if name in "PQ" else "")

    assert fake.outcomes() == drawn(*"abcdefgh") | {"P": EngineCrashed, "Q": EngineCrashed}
    assert len(fake.restarts) == 6
    assert fake.engine.state is not EngineState.FAILED


def test_crash_that_no_suspect_repeats_alone_fails_no_request(fake: Fake) -> None:
    fake.ask("a")
    fake.ask("P", "poison-in-company@3")
    fake.ask("b")

    assert fake.outcomes() == drawn("a", "P", "b")
    assert (len(fake.restarts), fake.asked(1)) == (1, "bPa")
    # All is as before: what comes now is drawn together.
    fake.ask("c", num_inference_steps=100)
    fake.ask("d", num_inference_steps=5).result(HANG_SECONDS)
    assert not fake.futures["c"].done()


def test_suspect_that_was_alone_by_chance_is_tried_once_more_and_fails_no_other(fake: Fake) -> None:
    fake.ask("P", "poison@3")
    eventually(lambda: bool(fake.restarts))
    fake.ask("a", arrived_at=-1.0)

    assert fake.outcomes() == {"P": EngineCrashed, "a": None}
    assert [fake.asked(life) for life in range(3)] == ["P", "P", "a"]


def test_a_request_starts_over_in_the_next_child_and_cannot_be_withdrawn_then(fake: Fake) -> None:
    fake.ask("a")
    eventually(lambda: len(fake.steps["a"]) > 3)
    kill(fake.engine)
    eventually(lambda: len(fake.restarts) == 1)

    assert not fake.futures["a"].cancel()

    assert fake.outcomes() == drawn("a")
    begin = fake.steps["a"].index(0, 1)
    assert begin > 3
    assert fake.steps["a"] == [*range(begin), *range(LONG + 1)]


def test_a_suspect_that_is_cancelled_while_another_is_tried_ends_at_once(fake: Fake) -> None:
    cancelled = threading.Event()
    fake.ask("P", "poison-in-company@3")
    fake.ask("a", is_cancelled=cancelled.is_set)
    fake.ask("b", num_inference_steps=200)
    eventually(lambda: fake.steps["b"].count(0) == 2)

    cancelled.set()

    assert isinstance(fake.futures["a"].exception(HANG_SECONDS), RequestCancelled)
    assert not fake.futures["b"].done()
    assert fake.outcomes() == {"P": None, "a": RequestCancelled, "b": None}
    assert fake.all_asked() == {"P": 2, "a": 1, "b": 2}


def test_child_that_dies_idle_is_replaced_and_accuses_no_request(fake: Fake) -> None:
    for number in range(3):
        wait_until_ready(fake.engine, HANG_SECONDS)
        kill(fake.engine)
        eventually(lambda number=number: len(fake.restarts) == number + 1)

    fake.ask("a")
    assert fake.outcomes() == drawn("a")


def test_a_child_that_dies_in_the_middle_of_a_message_is_a_crash_like_any_other(fake: Fake) -> None:
    fake.ask("P", "tear@3")
    assert fake.outcomes() == {"P": EngineCrashed}

    fake.ask("a")
    assert fake.outcomes() == {"P": EngineCrashed, "a": None}


def test_engine_load_is_zero_after_a_crash(fake: Fake) -> None:
    fake.ask("P", "poison@5")
    fake.outcomes()

    assert max(one.num_lanes for one in fake.engine_loads) == 1
    assert fake.engine_loads[-1] == EngineLoad(0, 0, 0, 0, NUM_SLOTS)


def test_an_engine_that_crashes_again_and_again_gives_up(fake: Fake) -> None:
    for name in "PQRSTUV":
        fake.ask(name, "poison@1")

    outcomes = fake.outcomes()

    # A crash of all and two alone for each of the newest two; then one of all and one alone make eight.
    assert MAX_CONSECUTIVE_CRASHES == 8
    assert outcomes == dict.fromkeys("PQRST", EngineClosed) | dict.fromkeys("UV", EngineCrashed)
    assert (fake.engine.state, len(fake.restarts)) == (EngineState.FAILED, 8)
    assert "8 times in a row" in fake.engine.failure
    with pytest.raises(EngineClosed):
        fake.ask("late")


def test_only_a_finished_request_resets_the_crash_count(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference.process.health, "MAX_CONSECUTIVE_CRASHES", 3)
    for prompt in ("poison@1", "", "poison@1", "fail@1"):
        fake.ask(f"{len(fake.futures)}", prompt)
        fake.outcomes()
    assert fake.engine.state is not EngineState.FAILED

    fake.ask("last", "poison@1")

    assert list(fake.outcomes().values()) == [EngineCrashed, None, EngineCrashed, RequestFailed, EngineClosed]
    assert fake.engine.state is EngineState.FAILED


# --- Sick


def test_faults_in_a_row_end_the_child_and_make_no_suspects(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    # Given two that are being drawn, and three that meet faults
    assert MAX_CONSECUTIVE_FAULTS == 3
    for name in "abFGH":
        fake.ask(name, "fault@3" if name in "FGH" else "", num_inference_steps=100)

    assert fake.outcomes() == drawn("a", "b") | dict.fromkeys("FGH", EngineFault)

    # Then both are drawn by the next child, together
    assert len(fake.restarts) == 1
    assert fake.asked(1) == "ab"
    assert names("begin", fake.lives()[1][: fake.lives()[1].index("end a")]) == "ab"
    assert "engine sick" in caplog.messages


def test_faults_with_a_finished_request_between_or_of_one_request_do_not_end_the_child(fake: Fake) -> None:
    for name in ("F", "G", "a", "H", "I"):
        fake.ask(name, "" if name == "a" else "fault@1", num_inference_steps=3).exception(HANG_SECONDS)
    for _ in range(4):
        fake.ask("I", "fault@1").exception(HANG_SECONDS)

    assert fake.restarts == []


def test_failing_child_gets_no_more_requests(fake: Fake) -> None:
    for name in "FGH":
        fake.ask(name, "fault@1").exception(HANG_SECONDS)
    fake.ask("a").result(HANG_SECONDS)

    assert [fake.asked(life) for life in range(2)] == ["FGH", "a"]


def test_broken_engine_returns_no_result_and_its_requests_are_retried(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.ask("B", "break@3")

    assert fake.outcomes() == {"B": EngineCrashed}

    codes = [vars(record)["fields"]["exit_code"] for record in caplog.records if record.message == "engine crashed"]
    assert codes == [EXIT_BROKEN] * 2


# --- Hung


def test_a_request_that_hangs_alone_twice_fails_as_hung(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake(min_hang_seconds=1.0)
    fake.ask("H", "hang@2")

    assert fake.outcomes() == {"H": EngineHung}
    assert (len(fake.restarts), fake.steps["H"]) == (2, [0, 1, 0, 1])


def test_a_hang_among_others_is_found_as_a_crash_is(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake(min_hang_seconds=2.0)
    for name in "abHc":
        fake.ask(name, "hang@2" if name == "H" else "")

    assert fake.outcomes() == drawn("a", "b", "c") | {"H": EngineHung}
    assert [fake.asked(life) for life in range(4)] == ["abHc", "cH", "H", "ab"]


def test_an_idle_engine_may_be_silent(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake(min_hang_seconds=5.0)
    fake.ask("a").result(HANG_SECONDS)
    time.sleep(6.0)

    assert fake.restarts == []
    fake.ask("b")
    assert fake.outcomes() == drawn("a", "b")
    assert fake.restarts == []


# The fake falls silent for 1.5 s. It says a step takes 0.01 s, so a lane of base size may take 0.2 s.
@pytest.mark.parametrize(
    ("requests", "is_patient"),
    [
        ([{}], False),
        ([{"seeds": tuple(range(5))}], False),
        ([{"seeds": tuple(range(15))}], True),
        ([{"width": 512, "height": 512}], True),
        ([{"seeds": tuple(range(5))}] * 3, True),
    ],
    ids=["small", "five lanes", "fifteen lanes", "large", "thrice five lanes"],
)
def test_silence_limit_grows_with_the_requests_in_the_child(
    new_fake: Callable[..., Fake], requests: Sequence[dict[str, Any]], is_patient: bool
) -> None:
    fake = new_fake(min_hang_seconds=0.5)
    for name, fields in zip("abc", requests, strict=False):
        fake.ask(name, "pause@2" if name == "a" else "", **fields)

    if is_patient:
        assert set(fake.outcomes().values()) == {None}
        assert fake.restarts == []
    else:
        assert fake.outcomes() == {"a": EngineHung}


# --- Started and closed


def test_closing_ends_what_is_drawn_and_what_waits(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake(MAX_CONCURRENT_GENERATIONS=1)
    for name in "abc":
        fake.ask(name, num_inference_steps=1000)
    eventually(lambda: len(fake.steps["a"]) > 1)
    fake.futures["c"].cancel()
    pid = fake.engine.pid

    fake.engine.close()

    for name in "ab":
        assert isinstance(fake.futures[name].exception(0), EngineClosed)
    assert fake.futures["c"].cancelled()
    assert (fake.engine.state, fake.engine.pid, fake.restarts) == (EngineState.CLOSED, None, [])
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(EngineClosed):
        fake.ask("late")


def test_silent_child_that_reads_no_image_is_killed_as_silent(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake(min_hang_seconds=1.0)
    wait_until_ready(fake.engine, HANG_SECONDS)
    silent = fake.engine.pid
    assert silent is not None
    os.kill(silent, signal.SIGSTOP)

    fake.ask("a", num_inference_steps=2, source=Source(bytes(IMAGE_BYTES), 1.0))

    assert fake.outcomes() == drawn("a")
    assert fake.engine.pid != silent


def test_closing_waits_for_no_image_that_a_child_does_not_read(new_fake: Callable[..., Fake]) -> None:
    fake = new_fake()
    wait_until_ready(fake.engine, HANG_SECONDS)
    assert fake.engine.pid is not None
    os.kill(fake.engine.pid, signal.SIGSTOP)
    fake.ask("a", source=Source(bytes(IMAGE_BYTES), 1.0))
    eventually(lambda: fake.engine._requests.inside)

    threading.Thread(target=fake.engine.close, daemon=True).start()

    assert fake.outcomes() == {"a": EngineClosed}


def test_a_request_with_a_control_has_time_to_load_its_controlnet(fake: Fake) -> None:
    wait_until_ready(fake.engine, HANG_SECONDS)
    assert fake.engine.facts is not None
    now = [0.0]
    health = ChildHealth(60.0, lambda: now[0])
    plain, controlled = request_of(), request_of(control=Control("pose", b""))

    now[0] = 100.0
    assert health.is_hung([plain], fake.engine.facts_by_model)
    assert not health.is_hung([plain, controlled], fake.engine.facts_by_model)

    now[0] = 1000.0
    assert health.is_hung([plain, controlled], fake.engine.facts_by_model)


def test_idle_child_is_closed_by_a_message(fake: Fake) -> None:
    fake.ask("a").result(HANG_SECONDS)

    fake.engine.close()

    assert fake.lives()[0][-1] == "close -"


def test_child_that_cannot_start_reports_the_reason(tmp_path: Path) -> None:
    settings = ModelSettings(MODEL_ID=str(tmp_path / "nowhere" / "journal"))
    engine = EngineProcess(settings, log_level="INFO", on_restart=lambda: None, spawn=spawn_fake)
    engine.start()
    waiting = engine.generate(request_of(), ignore, never)

    with pytest.raises(EngineClosed, match="no folder"):
        wait_until_ready(engine, HANG_SECONDS)
    with pytest.raises(EngineClosed, match="no folder"):
        waiting.result(HANG_SECONDS)
    assert engine.state is EngineState.FAILED


def kill(engine: EngineProcess) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _hear_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_a_child_of_a_checkout_started_by_its_module_finds_the_checkout(tmp_path: Path) -> None:
    """As `python -m worker` does it where nothing, or another version, is installed."""
    shutil.copytree(ROOT / "inference", tmp_path / "inference", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "inference" / "place.py").write_text("print(__file__)")
    (tmp_path / "started.py").write_text(
        "import os, subprocess, sys\n"
        "from inference.process.child_handle import path_variables\n"
        "subprocess.run([sys.executable, '-m', 'inference.place'], env=os.environ | path_variables(), check=True)\n"
    )
    started = [sys.executable, "-m", "started"]

    completed = subprocess.run(
        started, cwd=tmp_path, env={"PYTHONPATH": ""}, capture_output=True, text=True, check=True
    )

    assert completed.stdout.strip() == str(tmp_path / "inference" / "place.py")
