"""The engine in a process of its own: started, fed, watched, and started again after a crash."""

import logging
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from enum import Enum, auto

from config.logs import LogFormat, log_event
from config.model import DEFAULT_MODEL, ModelSettings
from inference.errors import EngineClosed, EngineCrashed, EngineFault, EngineHung
from inference.process.child_handle import ChildHandle
from inference.process.health import MIN_HANG_SECONDS, ChildHealth
from inference.process.pending import Pending, PendingRequests
from inference.process.protocol import Failed, Finished, FromChild, Ready, Start, StartFailed, Stepped
from inference.request import (
    EngineLoad,
    GenerationRequest,
    GenerationResult,
    IsCancelled,
    ModelFacts,
    OnLoadReport,
    OnStep,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1


class EngineState(Enum):
    """What the engine's process is doing."""

    STARTING = auto()  # spawned, loading the model
    READY = auto()
    FAILED = auto()  # final: nothing will be drawn any more, `failure` says why
    CLOSED = auto()


class _End(Enum):
    """Why a child is no longer served."""

    CLOSED = auto()  # by us: the engine is closing or has given up
    CRASHED = auto()
    HUNG = auto()
    SICK = auto()  # too many faults in a row


class EngineProcess:
    """`Engine` in a child process. Its one thread owns the child, the pipe and the pending requests.

    The child gets every request at once and draws them together. A child that dies, hangs or answers with faults alone
    is replaced, and its requests are sent to the next one; the quarantine decides which of them together. A request
    found to crash the child fails with `EngineCrashed` or `EngineHung`; the others are drawn without an error.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        log_level: str,
        log_format: LogFormat = "auto",
        on_restart: Callable[[], None],
        on_load_report: OnLoadReport = lambda _load: None,
        min_hang_seconds: float = MIN_HANG_SECONDS,
        spawn: Callable[[ModelSettings], ChildHandle] = ChildHandle.spawn,
    ) -> None:
        """`on_restart` and `on_load_report` run on the owner thread and must not block."""
        self._settings = settings
        self._log_level = log_level
        self._log_format = log_format
        self._on_restart = on_restart
        self._on_load_report = on_load_report
        self._spawn = spawn
        self._requests = PendingRequests()
        self._health = ChildHealth(min_hang_seconds)
        self._engine_load: EngineLoad | None = None
        self._is_closing = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        # PR_SET_PDEATHSIG follows the spawning *thread*: the child lives as long as this one, not one moment longer.
        self._thread = threading.Thread(target=self._run, name="engine-owner", daemon=True)
        self.state = EngineState.STARTING
        self.facts_by_model: Mapping[str, ModelFacts] = {}
        self.failure = ""
        self.pid: int | None = None

    @property
    def facts(self) -> ModelFacts | None:
        """Facts of the default model; None until it is loaded for the first time."""
        return self.facts_by_model.get(DEFAULT_MODEL)

    def start(self) -> None:
        """Spawn the child and return; `state` turns READY, or FAILED with the reason in `failure`."""
        self._thread.start()

    def generate(
        self, request: GenerationRequest, on_step: OnStep, is_cancelled: IsCancelled
    ) -> Future[GenerationResult]:
        """Queue `request`; see `Engine`."""
        pending = Pending(request, on_step, is_cancelled)
        self._requests.add(pending)
        self._wake()
        return pending.future

    def close(self) -> None:
        """End the child, even in the middle of a step; unanswered requests end as `EngineClosed`."""
        self._is_closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self) -> None:
        self._wake_writer.send(b"x")

    # Everything below runs on the owner thread.

    def _run(self) -> None:
        try:
            while not self._is_closing and self.state is not EngineState.FAILED:
                if self._health.is_hopeless:
                    self._give_up(f"the engine crashed {self._health.crashes_in_a_row} times in a row")
                else:
                    self._run_child()
        except Exception as error:
            logger.exception("the engine's owner failed")
            self._give_up(f"the engine's owner failed: {type(error).__name__}: {error}")
        finally:
            if self.state is not EngineState.FAILED:
                self._requests.refuse("the engine is closed")
                self.state = EngineState.CLOSED
            self._requests.fail_all(self.failure or "the engine was closed")

    def _give_up(self, reason: str) -> None:
        log_event(logger, "engine failed", logging.CRITICAL, reason=reason)
        self.failure = reason
        self._requests.refuse(reason)
        self.state = EngineState.FAILED

    def _run_child(self) -> None:
        """Spawn a child and serve it until it ends."""
        self.state = EngineState.STARTING
        child = self._spawn(self._settings)
        self.pid = child.process.pid
        end = _End.CLOSED
        try:
            child.send(Start(self._settings, self._log_level, self._log_format))
            end = self._serve(child)
        finally:
            is_at_rest = self.state is EngineState.READY and not self._requests.inside
            child.end(is_idle=is_at_rest and end is _End.CLOSED)
            self.pid = None

        if end is not _End.CLOSED and not self._is_closing:
            self._on_crash(end, child.process.returncode)

    def _serve(self, child: ChildHandle) -> _End:
        """Handle the child's messages and send it requests, until it is to be closed or replaced."""
        # One selector for the child's life: multiprocessing.connection.wait would make one for every message.
        with selectors.DefaultSelector() as selector:
            selector.register(child.connection, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self._is_closing and self.state is not EngineState.FAILED:
                ready = [key.fileobj for key, _ in selector.select(POLL_SECONDS)]
                if self._wake_reader in ready:
                    self._wake_reader.recv(4096)
                if child.connection in ready:
                    message = child.receive()
                    if message is None:
                        return _End.CRASHED
                    self._health.note_sign()
                    self._handle(message)
                if self._health.is_sick:
                    log_event(logger, "engine sick", logging.ERROR)
                    return _End.SICK
                self._requests.take_new()
                self._requests.pass_on_cancels(child)
                self._dispatch(child)
                if self._is_hung():
                    return _End.HUNG
        return _End.CLOSED

    def _handle(self, message: FromChild) -> None:
        match message:
            case Ready(facts_by_model):
                self.facts_by_model = facts_by_model
                self.state = EngineState.READY
                facts = facts_by_model[DEFAULT_MODEL]
                log_event(logger, "engine ready", device=facts.device, dtype=facts.dtype, model=facts.model)
            case StartFailed(reason):
                self._give_up(reason)
            case Stepped(reports, engine_load):
                for request_id, report in reports:
                    self._requests.report(request_id, report)
                self._engine_load = engine_load
                self._on_load_report(engine_load)
            case Finished(request_id, result):
                self._health.note_finished()
                self._requests.pop(request_id).finish(result)
            case Failed(request_id, error):
                if isinstance(error, EngineFault):
                    self._health.note_fault(request_id)
                self._requests.pop(request_id).fail(error)

    def _dispatch(self, child: ChildHandle) -> None:
        if self.state is not EngineState.READY:
            return
        if not self._requests.inside:
            self._health.note_sign()  # an idle child sends nothing
        self._requests.send_next(child)

    def _is_hung(self) -> bool:
        inside = [pending.request for pending in self._requests.inside]
        if not inside or not self._health.is_hung(inside, self.facts_by_model):
            return False
        log_event(logger, "engine hung", logging.ERROR, silent_seconds=round(self._health.silent_seconds, 1))
        return True

    def _on_crash(self, end: _End, exit_code: int) -> None:
        self._health.note_crash()
        self._on_restart()
        if self._engine_load is not None:
            self._on_load_report(self._engine_load.emptied)
        log_event(
            logger,
            "engine crashed",
            logging.ERROR,
            exit_code=exit_code,
            in_a_row=self._health.crashes_in_a_row,
            num_inside=len(self._requests.inside),
        )
        if end is _End.SICK:
            self._requests.on_restart()
            return
        poison = self._requests.on_crash(is_killed=end is _End.CRASHED and exit_code == -signal.SIGKILL)
        if poison is None:
            return
        again = "again and again while it ran alone"
        if end is _End.HUNG:
            poison.fail(EngineHung(f"the engine hung on this job {again}"))
        else:
            poison.fail(EngineCrashed(f"the engine died of this job {again} (exit code {exit_code})"))


def wait_until_ready(engine: EngineProcess, timeout_seconds: float) -> None:
    """Block until the engine is ready; raise `EngineClosed` with the reason if it failed or took too long."""
    deadline = time.monotonic() + timeout_seconds
    while engine.state is EngineState.STARTING and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if engine.state is not EngineState.READY:
        raise EngineClosed(engine.failure or f"the engine was not ready after {timeout_seconds:.0f} s")
