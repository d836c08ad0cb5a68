"""The life cycle of a worker: start its parts, watch them, drain, stop, and the exit codes."""

import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

from config.logs import log_event
from config.settings import Settings, misspelled_names
from inference.process.engine_process import EngineState
from inference.request import ModelFacts
from worker.amqp.connection import ConnectionProbe, probe_connection
from worker.amqp.consumer import Consumer
from worker.exit_code import ExitCode
from worker.idle_countdown import IdleCountdown
from worker.jobs.dispatcher import Dispatcher
from worker.monitoring.idle import idle_reason
from worker.wiring import Parts

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
# The end of the grace period, kept for releasing jobs and closing connections.
GRACE_RESERVE_SECONDS = 5.0
MIN_STOP_SECONDS = 2.0
# glibc's mallopt(3): once an image's memory was freed, glibc would take the next one's from heaps that it keeps.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 1 << 20


class Supervisor:
    """Owner of the worker's life cycle. `run` blocks on the main thread, the only one that receives signals."""

    def __init__(self, settings: Settings, *, countdown: IdleCountdown | None = None) -> None:
        """Build the parts. The worker ends by itself when the `countdown` is over, without one by a signal only."""
        self._settings = settings
        self._countdown = countdown
        self._num_signals = 0
        self._has_bug = False
        self._probe = ConnectionProbe()
        self._dispatcher: Dispatcher | None = None
        self._consumer: Consumer | None = None
        self._is_drained = threading.Event()
        self._lease_thread = threading.Thread(target=self._renew_leases, name="leases", daemon=True)
        self._parts = Parts(settings, is_stopping=lambda: bool(self._num_signals) or self._parts.is_draining.is_set())

    def run(self) -> ExitCode:
        """Work until a signal or a fatal failure; return the exit code for it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.excepthook = self._on_thread_failure
        # The memory of images goes back to the system as soon as it is freed, where the C library is glibc.
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        parts = self._parts
        parts.health.start()
        log_event(logger, "status page", url=f"http://localhost:{parts.health.port}/")
        log_event(logger, "starting", metrics_port=parts.health.port, model=self._settings.model.model_id)
        for doubt in misspelled_names():
            log_event(logger, "setting not known", logging.WARNING, reason=doubt)
        # Reported before the model is loaded, which takes minutes; the consumer tries again for ever.
        self._probe = probe_connection(self._settings.broker)
        if self._probe.reason:
            log_event(logger, "broker not usable", logging.WARNING, reason=self._probe.reason)
        log_event(logger, "loading", model=self._settings.model.model_id)
        for part in (parts.engine, parts.publisher, parts.progress, parts.previewer, parts.gauges, parts.snapshots):
            part.start()

        code = self._watch()
        self._stop(code)
        return code

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Only a count: a handler may interrupt the main thread while it holds any lock.
        self._num_signals += 1
        if self._num_signals > 1:
            # The broker requeues what was not settled.
            if self._parts.engine.pid is not None:
                os.kill(self._parts.engine.pid, signal.SIGKILL)
            os._exit(ExitCode.FORCED)

    def _on_thread_failure(self, failure: threading.ExceptHookArgs) -> None:
        """Have the worker drain and be restarted: one that lacks a thread looks alive and is not."""
        if failure.exc_value is not None:
            logger.critical("a thread failed: %s", failure.thread and failure.thread.name, exc_info=failure.exc_value)
        self._note_bug()

    def _note_bug(self) -> None:
        self._has_bug = True

    def _watch(self) -> ExitCode:
        engine = self._parts.engine
        while not self._num_signals:
            if engine.state is EngineState.FAILED:
                return ExitCode.ENGINE
            if self._has_bug:
                return ExitCode.BUG
            if self._consumer is None and engine.facts is not None:
                self._start_consuming(engine.facts, engine.facts_by_model)
            self._tick()
            if self._is_countdown_over():
                return ExitCode.OK
            time.sleep(TICK_SECONDS)
        return ExitCode.OK

    def _is_countdown_over(self) -> bool:
        parts = self._parts
        if self._countdown is None or self._dispatcher is None:
            return False
        is_over = self._countdown.is_over(
            is_consuming=not parts.readiness.why_not(),
            is_at_work=bool(parts.runs.all() or parts.outbox.held()),
            has_tasks=self._dispatcher.has_tasks,
            num_taken=parts.runs.num_begun + self._dispatcher.num_taken,
        )
        if is_over:
            log_event(logger, "idle", seconds=self._countdown.seconds)
        return is_over

    def _start_consuming(self, facts: ModelFacts, facts_by_model: Mapping[str, ModelFacts]) -> None:
        """Start to take jobs. Only now: a worker that cannot load its model must leave the queue to those that can."""
        self._parts.progress.update_estimate(facts.step_seconds)
        self._parts.metrics.set_build(model=self._settings.model.model_id, family=facts.family)
        self._dispatcher = self._parts.dispatcher(facts_by_model, self._note_bug)
        self._consumer = self._parts.consumer(self._dispatcher, not_before=self._probe.retry_at)
        self._consumer.start()
        self._lease_thread.start()

    def _renew_leases(self) -> None:
        """Keep the leases until the last run is over: one that ran out in a long drain would count as a crash."""
        while not self._is_drained.wait(self._parts.leases.renew_every):
            self._parts.lease_keeper.take_or_renew_all()

    def _tick(self) -> None:
        parts = self._parts
        is_refused = bool(parts.readiness.refusal)
        if self._consumer is not None:
            self._consumer.pause(is_paused=is_refused)
        reason = idle_reason(
            phases={run.phase for run in parts.runs.all()},
            is_engine_ready=parts.engine.state is EngineState.READY,
            is_broker_connected=parts.readiness.is_connected,
            is_refused=is_refused,
            is_switching=bool(parts.metrics.switching_to),
        )
        parts.idle.tick(reason)

    def _stop(self, code: ExitCode) -> None:
        """Take no more jobs, let running ones end within the grace period, release the rest, close all parts."""
        parts, started_at = self._parts, time.monotonic()
        end_process_after(max(MIN_STOP_SECONDS, self._settings.service.shutdown_grace_seconds), code)
        log_event(logger, "stopping", exit_code=int(code), num_runs=len(parts.runs.all()))
        if self._consumer is not None:
            self._consumer.stop_consuming()
        parts.is_draining.set()
        if self._dispatcher is not None:
            self._drain(self._dispatcher)
        parts.engine.close()
        if self._dispatcher is not None:
            self._dispatcher.close()
            self._is_drained.set()
            # A note that it is just writing is given up after that: one left behind would count as a crash.
            self._lease_thread.join(MIN_STOP_SECONDS)
        parts.progress.close()
        parts.previewer.close()
        if self._consumer is not None:
            parts.outbox.close()
            self._consumer.close()
        parts.publisher.close()
        parts.tracing.close()
        parts.health.close()
        log_event(logger, "stopped", seconds=round(time.monotonic() - started_at, 2))

    def _drain(self, dispatcher: Dispatcher) -> None:
        deadline = time.monotonic() + self._settings.service.shutdown_grace_seconds - GRACE_RESERVE_SECONDS
        while self._parts.runs.all() and time.monotonic() < deadline:
            dispatcher.release_waiting()
            self._tick()
            time.sleep(TICK_SECONDS)


def end_process_after(seconds: float, code: ExitCode) -> None:
    """End the process even if store or broker hang by then: unsettled deliveries go back to the broker."""
    guard = threading.Timer(seconds, os._exit, (int(code),))
    guard.daemon = True
    try:
        guard.start()
    except RuntimeError:
        # No memory for a thread, or no process id: nothing closes in order then, and what runs would go on taking jobs.
        os._exit(int(code))
