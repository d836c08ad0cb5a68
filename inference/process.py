"""The engine in a process of its own: started, fed, watched, and started again after a crash."""

import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from enum import Enum, auto
from multiprocessing.connection import Connection

from config.logs import log_event
from config.settings import ModelSettings
from inference.child_process import Child
from inference.request import (
    EngineClosed,
    EngineCrashed,
    EngineHung,
    GenerationRequest,
    GenerationResult,
    IsCancelled,
    ModelFacts,
    OnStep,
)
from inference.wire import (
    Cancel,
    Failed,
    Finished,
    FromChild,
    Generate,
    Ready,
    Start,
    StartFailed,
    Stepped,
    ToChild,
)

logger = logging.getLogger(__name__)

MAX_CRASHES_PER_REQUEST = 2
# Crashes in a row, no request finished between: a sick device or a broken install. Fail the process, not the queue.
MAX_CONSECUTIVE_CRASHES = 5
# Silence after which a request counts as hung: never less than this, and never less than what it could honestly take.
MIN_HANG_SECONDS = 60.0
MAX_STEP_FACTOR = 20.0
POLL_SECONDS = 0.1


class EngineState(Enum):
    """What the engine's process is doing."""

    STARTING = auto()  # spawned, loading the model
    READY = auto()
    FAILED = auto()  # gave up: `failure` says why; nothing will be drawn any more
    CLOSED = auto()


@dataclass(slots=True)
class _Pending:
    """A request not yet answered."""

    request: GenerationRequest
    on_step: OnStep
    is_cancelled: IsCancelled
    future: Future[GenerationResult] = field(default_factory=Future)
    crashes: int = 0
    cancel_sent: bool = False
    is_hung: bool = False


class EngineProcess:
    """`Engine` in a child process. Its one thread owns the child, the pipe and the pending requests.

    The child gets one request at a time, so a crash always has one culprit. That request is tried again in a fresh
    child and fails as `EngineCrashed` after `MAX_CRASHES_PER_REQUEST`; those that wait never notice. A child that falls
    silent over a request is killed, which is one crash more.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        log_level: str,
        on_restart: Callable[[], None],
        min_hang_seconds: float = MIN_HANG_SECONDS,
    ) -> None:
        self._settings = settings
        self._log_level = log_level
        self._on_restart = on_restart
        self._min_hang_seconds = min_hang_seconds
        self._heard_at = 0.0
        self._lock = threading.Lock()
        self._waiting: deque[_Pending] = deque()
        self._running: _Pending | None = None
        self._is_closing = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._consecutive_crashes = 0
        # PR_SET_PDEATHSIG follows the spawning *thread*: the child lives as long as this one, not one moment longer.
        self._thread = threading.Thread(target=self._run, name="engine-owner", daemon=True)
        self.state = EngineState.STARTING
        self.facts: ModelFacts | None = None
        self.failure = ""
        self.pid: int | None = None

    def start(self) -> None:
        """Spawn the child and return; `state` tells when it is ready or why it never will be."""
        self._thread.start()

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]:
        """Queue `request`; see `Engine`."""
        pending = _Pending(request, on_step, is_cancelled)
        with self._lock:
            if self.state in (EngineState.FAILED, EngineState.CLOSED):
                raise EngineClosed(self.failure or "the engine is closed")
            self._waiting.append(pending)
        self._wake()
        return pending.future

    def close(self) -> None:
        """End the child, at once if it is drawing; whatever is unanswered ends as `EngineClosed`."""
        self._is_closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()

    # Everything below runs on the owner thread.

    def _run(self) -> None:
        try:
            while self._may_go_on():
                self._live_one_life()
        except Exception as error:
            logger.exception("the engine's owner failed")
            self._give_up(f"the engine's owner failed: {type(error).__name__}: {error}")
        finally:
            with self._lock:
                if self.state is not EngineState.FAILED:
                    self.state = EngineState.CLOSED
            self._refuse_all()

    def _may_go_on(self) -> bool:
        if self._is_closing or self.state is EngineState.FAILED:
            return False
        if self._consecutive_crashes >= MAX_CONSECUTIVE_CRASHES:
            self._give_up(f"the engine crashed {self._consecutive_crashes} times in a row")
            return False
        return True

    def _live_one_life(self) -> None:
        """Spawn a child and serve it until it ends."""
        self.state = EngineState.STARTING
        child = Child.spawn()
        self.pid = child.process.pid
        try:
            child.connection.send(Start(self._settings, self._log_level))
            self._serve(child.connection)
        except (EOFError, ConnectionError):
            pass  # the child is gone; what it leaves behind is sorted out below
        finally:
            child.end(is_idle=self._running is None and self.state is EngineState.READY)
            self.pid = None

        if not self._is_closing and self.state is not EngineState.FAILED:
            self._after_crash(child.process.returncode)

    def _serve(self, connection: "Connection[ToChild, FromChild]") -> None:
        # One selector for the child's life: multiprocessing.connection.wait would make one for every message.
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self._is_closing and self.state is not EngineState.FAILED:
                ready = [key.fileobj for key, _ in selector.select(POLL_SECONDS)]
                if self._wake_reader in ready:
                    self._wake_reader.recv(4096)
                if connection in ready:
                    self._heard_at = time.monotonic()
                    self._handle(connection.recv())
                self._dispatch(connection)
                self._pass_on_cancel(connection)
                self._kill_if_hung()

    def _handle(self, message: FromChild) -> None:
        match message:
            case Ready(facts):
                self.facts = facts
                self.state = EngineState.READY
                log_event(logger, "engine ready", device=facts.device, dtype=facts.dtype, model=facts.model)
            case StartFailed(reason):
                self._give_up(reason)
            case Stepped(request_id, report):
                if self._running is not None and self._running.request.request_id == request_id:
                    self._running.on_step(report)
            case Finished() | Failed():
                self._answer(message)

    def _answer(self, message: Finished | Failed) -> None:
        running, self._running = self._running, None
        self._consecutive_crashes = 0
        assert running is not None, "the child answered a request nobody sent"  # noqa: S101
        if isinstance(message, Finished):
            running.future.set_result(message.result)
        else:
            running.future.set_exception(message.error)

    def _dispatch(self, connection: "Connection[ToChild, FromChild]") -> None:
        if self._running is not None or self.state is not EngineState.READY:
            return
        with self._lock:
            while self._waiting:
                pending = self._waiting.popleft()
                if pending.crashes or pending.future.set_running_or_notify_cancel():
                    self._running = pending
                    break
        if self._running is not None:
            self._heard_at = time.monotonic()
            connection.send(Generate(self._running.request))

    def _pass_on_cancel(self, connection: "Connection[ToChild, FromChild]") -> None:
        running = self._running
        if running is not None and not running.cancel_sent and running.is_cancelled():
            running.cancel_sent = True
            connection.send(Cancel(running.request.request_id))

    def _kill_if_hung(self) -> None:
        """The watchdog. What it kills shows as a closed pipe on the next turn."""
        if self._running is None or self._running.is_hung or self.pid is None:
            return
        silent_seconds = time.monotonic() - self._heard_at
        if silent_seconds > max(self._min_hang_seconds, self._longest_step_seconds(self._running.request)):
            log_event(logger, "engine hung", logging.ERROR, silent_seconds=round(silent_seconds, 1))
            self._running.is_hung = True
            os.kill(self.pid, signal.SIGKILL)

    def _longest_step_seconds(self, request: GenerationRequest) -> float:
        """What a step of `request` may take at the very worst, by the step measured at base size."""
        assert self.facts is not None, "a request runs only in a ready engine"  # noqa: S101
        area = request.width * request.height / self.facts.base_size**2
        return MAX_STEP_FACTOR * self.facts.step_seconds * len(request.seeds) * max(1.0, area)

    def _after_crash(self, exit_code: int) -> None:
        self._consecutive_crashes += 1
        self._on_restart()
        log_event(logger, "engine crashed", logging.ERROR, exit_code=exit_code, in_a_row=self._consecutive_crashes)
        victim, self._running = self._running, None
        if victim is None:
            return
        victim.crashes += 1
        victim.cancel_sent = False
        if victim.crashes >= MAX_CRASHES_PER_REQUEST:
            victim.future.set_exception(_defeat(victim, exit_code))
        else:
            victim.is_hung = False
            with self._lock:
                self._waiting.appendleft(victim)

    def _give_up(self, reason: str) -> None:
        log_event(logger, "engine failed", logging.CRITICAL, reason=reason)
        with self._lock:
            self.failure = reason
            self.state = EngineState.FAILED

    def _refuse_all(self) -> None:
        with self._lock:
            unanswered = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._running = None
        for pending in unanswered:
            try:
                pending.future.set_exception(EngineClosed(self.failure or "the engine was closed"))
            except InvalidStateError:
                continue  # its owner cancelled it first

    def _wake(self) -> None:
        self._wake_writer.send(b"x")


def _defeat(victim: _Pending, exit_code: int) -> EngineCrashed | EngineHung:
    if victim.is_hung:
        return EngineHung(f"the engine hung on this job; it was tried {victim.crashes} times")
    return EngineCrashed(f"the engine crashed {victim.crashes} times on this job (exit code {exit_code})")


def wait_until_ready(engine: EngineProcess, timeout_seconds: float) -> None:
    """Block until the engine is ready; raise `EngineClosed` with the reason if it failed or took too long."""
    deadline = time.monotonic() + timeout_seconds
    while engine.state is EngineState.STARTING and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if engine.state is not EngineState.READY:
        raise EngineClosed(engine.failure or f"the engine was not ready after {timeout_seconds:.0f} s")
