"""The engine in a process of its own: started, fed, watched, and started again after a crash."""

import logging
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum, auto
from multiprocessing.connection import Connection

from config.logs import LogFormat, log_event
from config.model import ModelSettings
from inference.errors import EngineClosed, EngineCrashed, EngineFault, EngineHung, RequestCancelled
from inference.process.child_handle import ChildHandle
from inference.process.health import MIN_HANG_SECONDS, ChildHealth
from inference.process.pending import Pending
from inference.process.pixels import receive_pixels
from inference.process.protocol import (
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
from inference.process.quarantine import Quarantine
from inference.request import (
    EngineLoad,
    GenerationRequest,
    GenerationResult,
    IsCancelled,
    ModelFacts,
    OnLoadReport,
    OnStep,
    StepReport,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1


class EngineState(Enum):
    """What the engine's process is doing."""

    STARTING = auto()  # spawned, loading the model
    READY = auto()
    FAILED = auto()  # gave up: `failure` says why; nothing will be drawn any more
    CLOSED = auto()


class _End(Enum):
    """Why a child is served no longer."""

    CLOSED = auto()  # by us: the engine is closing or has given up
    CRASHED = auto()
    HUNG = auto()
    SICK = auto()  # fault upon fault


class EngineProcess:
    """`Engine` in a child process. Its one thread owns the child, the pipe and the pending requests.

    The child gets every request at once and draws them together. A child that dies, falls silent or answers nothing but
    faults is replaced, and what was inside it is drawn again; `Quarantine` decides in which company, which is to
    blame: that one fails as `EngineCrashed` or `EngineHung`, the others never notice.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        log_level: str,
        log_format: LogFormat = "auto",
        on_restart: Callable[[], None],
        on_load_report: OnLoadReport = lambda _engine_load: None,
        min_hang_seconds: float = MIN_HANG_SECONDS,
        spawn: Callable[[ModelSettings], ChildHandle] = ChildHandle.spawn,
    ) -> None:
        """`on_restart` and `on_load_report` run on the owner thread: be quick."""
        self._settings = settings
        self._log_level = log_level
        self._log_format = log_format
        self._on_restart = on_restart
        self._on_load_report = on_load_report
        self._spawn = spawn
        self._lock = threading.Lock()
        self._newcomers: list[Pending] = []
        self._quarantine: Quarantine[Pending] = Quarantine()
        self._health = ChildHealth(min_hang_seconds)
        self._engine_load: EngineLoad | None = None
        self._is_closing = False
        self._wake_reader, self._wake_writer = socket.socketpair()
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
        pending = Pending(request, on_step, is_cancelled)
        with self._lock:
            if self.state in (EngineState.FAILED, EngineState.CLOSED):
                raise EngineClosed(self.failure or "the engine is closed")
            self._newcomers.append(pending)
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
        if self._health.is_hopeless:
            self._give_up(f"the engine crashed {self._health.crashes_in_a_row} times in a row")
            return False
        return True

    def _live_one_life(self) -> None:
        """Spawn a child and serve it until it ends."""
        self.state = EngineState.STARTING
        child = self._spawn(self._settings)
        self.pid = child.process.pid
        end = _End.CLOSED
        try:
            child.send(Start(self._settings, self._log_level, self._log_format))
            end = self._serve(child)
        finally:
            is_at_rest = self.state is EngineState.READY and not self._quarantine.inside
            child.end(is_idle=is_at_rest and end is _End.CLOSED)
            self.pid = None

        if end is not _End.CLOSED and not self._is_closing:
            self._after_crash(end, child.process.returncode)

    def _serve(self, child: ChildHandle) -> _End:
        connection = child.connection
        # One selector for the child's life: multiprocessing.connection.wait would make one for every message.
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while not self._is_closing and self.state is not EngineState.FAILED:
                ready = [key.fileobj for key, _ in selector.select(POLL_SECONDS)]
                if self._wake_reader in ready:
                    self._wake_reader.recv(4096)
                if connection in ready:
                    message = _receive(connection)
                    if message is None:
                        return _End.CRASHED
                    self._health.note_sign()
                    self._handle(message)
                if self._is_sick():
                    return _End.SICK
                self._take_newcomers()
                self._drop_unwanted()
                self._pass_on_cancels(child)
                self._dispatch(child)
                if self._is_hung():
                    return _End.HUNG
        return _End.CLOSED

    def _handle(self, message: FromChild) -> None:
        match message:
            case Ready(facts):
                self.facts = facts
                self.state = EngineState.READY
                log_event(logger, "engine ready", device=facts.device, dtype=facts.dtype, model=facts.model)
            case StartFailed(reason):
                self._give_up(reason)
            case Stepped(reports, engine_load):
                for request_id, report in reports:
                    self._pass_on_step(request_id, report)
                self._engine_load = engine_load
                self._on_load_report(engine_load)
            case Finished(request_id, result):
                self._health.note_finished()
                self._take_out(request_id).finish(result)
            case Failed(request_id, error):
                if isinstance(error, EngineFault):
                    self._health.note_fault(request_id)
                self._take_out(request_id).fail(error)

    def _pass_on_step(self, request_id: str, report: StepReport) -> None:
        pending = self._quarantine.find(request_id)
        if pending is not None and pending.begin():
            pending.on_step(report)

    def _take_out(self, request_id: str) -> Pending:
        pending = self._quarantine.find(request_id)
        assert pending is not None, "the child answered a request nobody sent"  # noqa: S101
        self._quarantine.remove(pending)
        return pending

    def _take_newcomers(self) -> None:
        with self._lock:
            newcomers, self._newcomers = self._newcomers, []
        for pending in newcomers:
            self._quarantine.add(pending)

    def _drop_unwanted(self) -> None:
        """Cancelled requests that are not inside never get there."""
        for pending in self._quarantine.outside:
            if pending.is_unwanted:
                self._quarantine.remove(pending)
                pending.fail(RequestCancelled("cancelled while it waited"))

    def _pass_on_cancels(self, child: ChildHandle) -> None:
        for pending in self._quarantine.inside:
            if not pending.is_cancel_sent and pending.is_unwanted:
                pending.is_cancel_sent = True
                child.send(Cancel(pending.request_id))

    def _dispatch(self, child: ChildHandle) -> None:
        if self.state is not EngineState.READY:
            return
        if not self._quarantine.inside:
            self._health.note_sign()  # an idle child has nothing to say
        for pending in self._quarantine.next_to_send():
            child.send(Generate(pending.request))

    def _is_sick(self) -> bool:
        if not self._health.is_sick:
            return False
        log_event(logger, "engine sick", logging.ERROR)
        return True

    def _is_hung(self) -> bool:
        inside = [pending.request for pending in self._quarantine.inside]
        if not inside or self.facts is None or not self._health.is_hung(inside, self.facts):
            return False
        log_event(logger, "engine hung", logging.ERROR, silent_seconds=round(self._health.silent_seconds, 1))
        return True

    def _after_crash(self, end: _End, exit_code: int) -> None:
        self._health.note_crash()
        self._on_restart()
        self._tell_empty()
        log_event(
            logger,
            "engine crashed",
            logging.ERROR,
            exit_code=exit_code,
            in_a_row=self._health.crashes_in_a_row,
            num_inside=len(self._quarantine.inside),
        )
        if end is _End.SICK:
            self._quarantine.on_restart()
            return
        culprit = self._quarantine.on_crash(is_killed=end is _End.CRASHED and exit_code == -signal.SIGKILL)
        if culprit is not None:
            culprit.fail(_defeat(end, exit_code))

    def _tell_empty(self) -> None:
        """Nothing is in the next child yet."""
        if self._engine_load is not None:
            held = self._engine_load
            num_slots = held.slots_active + held.slots_idle + held.slots_free
            self._on_load_report(EngineLoad(0, 0, slots_active=0, slots_idle=0, slots_free=num_slots))

    def _give_up(self, reason: str) -> None:
        log_event(logger, "engine failed", logging.CRITICAL, reason=reason)
        with self._lock:
            self.failure = reason
            self.state = EngineState.FAILED

    def _refuse_all(self) -> None:
        self._take_newcomers()
        for pending in (*self._quarantine.inside, *self._quarantine.outside):
            pending.fail(EngineClosed(self.failure or "the engine was closed"))

    def _wake(self) -> None:
        self._wake_writer.send(b"x")


def _receive(connection: "Connection[ToChild, FromChild]") -> FromChild | None:
    """The next message; None: the child is gone, perhaps in the middle of a message, or can be followed no more."""
    try:
        message = connection.recv()
        return receive_pixels(connection, message) if isinstance(message, Finished) else message
    except (EOFError, OSError, MemoryError):
        return None


def _defeat(end: _End, exit_code: int) -> EngineCrashed | EngineHung:
    if end is _End.HUNG:
        return EngineHung("the engine hung on this job again and again while it ran alone")
    return EngineCrashed(f"the engine died of this job again and again while it ran alone (exit code {exit_code})")


def wait_until_ready(engine: EngineProcess, timeout_seconds: float) -> None:
    """Block until the engine is ready; raise `EngineClosed` with the reason if it failed or took too long."""
    deadline = time.monotonic() + timeout_seconds
    while engine.state is EngineState.STARTING and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if engine.state is not EngineState.READY:
        raise EngineClosed(engine.failure or f"the engine was not ready after {timeout_seconds:.0f} s")
