"""The engine behind its process boundary: ready, cancelled, crashed, closed."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from config.settings import ModelSettings
from inference.process import MAX_CONSECUTIVE_CRASHES, EngineProcess, EngineState, wait_until_ready
from inference.request import (
    EngineClosed,
    EngineCrashed,
    EngineHung,
    RequestCancelled,
    RequestFailed,
    StepReport,
)
from tests.engine_requests import request_of
from tests.world import DEMO_MODEL, eventually

READY_SECONDS = 60.0


def new_engine(model: Path = DEMO_MODEL / "checkpoint") -> EngineProcess:
    engine = EngineProcess(ModelSettings(MODEL_ID=str(model)), log_level="INFO", on_restart=lambda: None)
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    made = new_engine()
    wait_until_ready(made, READY_SECONDS)
    yield made
    made.close()


def ignore(_report: StepReport) -> None:
    pass


def never() -> bool:
    return False


def test_a_ready_engine_tells_what_it_holds(engine: EngineProcess) -> None:
    facts = engine.facts

    assert facts is not None
    assert (facts.model, facts.family, facts.base_size, facts.size_multiple) == (
        "checkpoint",
        "stable-diffusion",
        128,
        8,
    )
    assert facts.step_seconds > 0


def test_a_request_becomes_its_picture_with_its_steps_and_stages(engine: EngineProcess) -> None:
    reports: list[StepReport] = []

    result = engine.generate(request_of(seeds=(1, 2)), reports.append, never).result()

    assert [(one.seed, len(one.rgb)) for one in result.pictures] == [(1, 128 * 128 * 3), (2, 128 * 128 * 3)]
    assert [report.step_index for report in reports] == list(range(9))
    assert [stage.name for stage in result.stages] == ["adapt", "encode", "denoise", "decode"]
    assert all(stage.started_at <= time.monotonic() for stage in result.stages)


def test_a_failure_crosses_the_boundary_with_its_code(engine: EngineProcess) -> None:
    with pytest.raises(RequestFailed, match="dpm") as failure:
        engine.generate(request_of(scheduler="magic"), ignore, never).result()

    assert failure.value.code == "INVALID_INPUT"


def test_a_cancelled_request_ends_within_two_steps_and_the_next_one_runs(engine: EngineProcess) -> None:
    reports: list[StepReport] = []

    cancelled = engine.generate(request_of(num_inference_steps=100), reports.append, lambda: len(reports) > 5)

    with pytest.raises(RequestCancelled):
        cancelled.result()
    assert len(reports) <= 8
    assert len(engine.generate(request_of(), ignore, never).result().pictures) == 1


def test_a_waiting_request_can_be_withdrawn_and_a_running_one_cannot(engine: EngineProcess) -> None:
    reports: list[StepReport] = []
    running = engine.generate(request_of(num_inference_steps=40), reports.append, never)
    waiting = engine.generate(request_of(), ignore, never)
    eventually(lambda: len(reports) > 0, 10)

    assert waiting.cancel()
    assert not running.cancel()

    assert len(running.result().pictures) == 1
    with pytest.raises(CancelledError):
        waiting.result()


def test_closing_ends_a_running_request_and_leaves_no_process() -> None:
    engine = new_engine()
    wait_until_ready(engine, READY_SECONDS)
    reports: list[StepReport] = []
    running = engine.generate(request_of(num_inference_steps=150, seeds=(1, 2, 3, 4)), reports.append, never)
    eventually(lambda: len(reports) > 1, 10)
    pid = engine.pid

    engine.close()

    with pytest.raises(EngineClosed):
        running.result()
    assert engine.state is EngineState.CLOSED
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(EngineClosed):
        engine.generate(request_of(), ignore, never)


def test_a_model_that_cannot_be_loaded_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    engine = new_engine(tmp_path)

    with pytest.raises(EngineClosed, match=r"model_index\.json"):
        wait_until_ready(engine, READY_SECONDS)

    assert engine.state is EngineState.FAILED


def test_an_engine_that_falls_silent_is_killed_and_the_request_drawn_by_the_next() -> None:
    engine = EngineProcess(
        ModelSettings(MODEL_ID=str(DEMO_MODEL / "checkpoint")),
        log_level="INFO",
        on_restart=lambda: None,
        min_hang_seconds=2.0,
    )
    engine.start()
    wait_until_ready(engine, READY_SECONDS)
    num_stops = 0

    def stop(report: StepReport) -> None:
        nonlocal num_stops
        if report.step_index == 2 and num_stops < 3:
            num_stops += 1
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGSTOP)

    hung = engine.generate(request_of(num_inference_steps=60), stop, never)
    assert isinstance(hung.exception(), EngineHung)

    # Once more, and then it goes well
    survivor = engine.generate(request_of(num_inference_steps=60), stop, never)
    assert len(survivor.result().pictures) == 1
    assert num_stops == 3
    engine.close()


def test_an_engine_that_crashes_again_and_again_gives_up() -> None:
    engine = new_engine()
    wait_until_ready(engine, READY_SECONDS)

    def kill(report: StepReport) -> None:
        if report.step_index == 1:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)

    futures = [engine.generate(request_of(), kill, never) for _ in range(4)]
    errors = [type(future.exception()) for future in futures]

    # Two crashes each for the first two; the fifth in a row is the engine's, and the rest are given back undrawn.
    assert MAX_CONSECUTIVE_CRASHES == 5
    assert errors == [EngineCrashed, EngineCrashed, EngineClosed, EngineClosed]
    assert engine.state is EngineState.FAILED
    engine.close()
