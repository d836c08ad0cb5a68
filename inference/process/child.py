"""The engine's own process: `python -m inference.process.child FD PARENT_PID`. `EngineProcess` starts it.

It holds no secret, opens no connection, and dies with the supervisor. A segfault, a sticky CUDA error or a hung step
in here costs this process and nothing else.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from config.logs import configure_logging, log_event
from config.model import ModelSettings
from inference.errors import EngineError, EngineFault, EngineStartFailed, RequestCancelled
from inference.process.pixels import send_finished
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
    Stop,
)
from inference.request import EngineLoad, GenerationRequest, GenerationResult, OnLoadReport, StepReport

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
# The device is beyond recovery in this process (sysexits' EX_SOFTWARE): what is inside is for the next one.
EXIT_BROKEN = 70

NOTHING = EngineLoad(num_batched=0, num_lanes=0, slots_active=0, slots_idle=0, slots_free=0)


def _load_local_engine(settings: ModelSettings, on_load_report: OnLoadReport) -> Any:
    from inference.engine.local_engine import LocalEngine  # noqa: PLC0415 - torch takes seconds: only once logging is set up

    return LocalEngine(settings, on_load_report)


def main(load: Callable[[ModelSettings, OnLoadReport], Any] = _load_local_engine) -> None:
    """Load the model, say so, then serve until the pipe ends."""
    connection: Connection[FromChild, Any] = Connection(int(sys.argv[1]))
    _die_with(parent_pid=int(sys.argv[2]))
    start: Start = connection.recv()
    configure_logging(start.log_level, start.log_format)
    server = _Server(connection)
    try:
        engine = load(start.settings, server.on_load_report)
    except EngineStartFailed as error:
        connection.send(StartFailed(str(error)))
        return

    connection.send(Ready(engine.facts))
    server.serve(engine)
    engine.close()


class _Asked(NamedTuple):
    """What is needed to cancel a request, whether it waits or is being drawn."""

    cancelled: threading.Event
    future: "Future[GenerationResult]"


class _Server:
    """Reads requests on the main thread. The engine's thread writes: the steps of a turn at its end or before the next
    answer, so that no step follows its request's answer."""

    def __init__(self, connection: "Connection[FromChild, Any]") -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self._asked: dict[str, _Asked] = {}
        self._has_begun = False
        self._reports: list[tuple[str, StepReport]] = []
        self._engine_load = NOTHING

    def serve(self, engine: Any) -> None:
        """Do what is asked until the pipe ends or says so."""
        while True:
            try:
                message = self._connection.recv()
            except EOFError:
                return
            match message:
                case Generate(request):
                    self._generate(engine, request)
                case Cancel(request_id):
                    self._cancel(request_id)
                case Stop():
                    return

    def on_load_report(self, engine_load: EngineLoad) -> None:
        """A turn of the engine's loop has ended."""
        if not self._has_begun:
            return  # the warm-up's turns are nobody's
        with self._writing:
            if self._reports or engine_load.num_batched or engine_load != self._engine_load:
                self._engine_load = engine_load
                self._send_reports(engine_load)

    def _generate(self, engine: Any, request: GenerationRequest) -> None:
        self._has_begun = True
        cancelled = threading.Event()
        try:
            future = engine.generate(request, partial(self._on_step, request.request_id), cancelled.is_set)
        except Exception as error:  # noqa: BLE001 - an answer like any other: the thread that reads must not end by it
            future = Future()
            future.set_exception(error)
        # Before the callback is added: it may run at once, and takes this out again.
        self._asked[request.request_id] = _Asked(cancelled, future)
        future.add_done_callback(partial(self._answer, engine, request.request_id))

    def _cancel(self, request_id: str) -> None:
        asked = self._asked.get(request_id)
        if asked is not None:
            asked.cancelled.set()
            asked.future.cancel()

    def _on_step(self, request_id: str, report: StepReport) -> None:
        with self._writing:
            self._reports.append((request_id, report))

    def _answer(self, engine: Any, request_id: str, done: "Future[GenerationResult]") -> None:
        if engine.is_broken:
            log_event(logger, "engine broken", logging.ERROR)
            logging.shutdown()  # or nobody would hear of it
            os._exit(EXIT_BROKEN)
        del self._asked[request_id]
        answer = _answer_of(request_id, done)
        with self._writing:
            if self._reports:
                # The turn's forward is counted at its end, once.
                self._send_reports(replace(self._engine_load, num_batched=0))
            if isinstance(answer, Finished):
                send_finished(self._connection, request_id, answer.result)
            else:
                self._connection.send(answer)

    def _send_reports(self, engine_load: EngineLoad) -> None:
        reports, self._reports = tuple(self._reports), []
        self._connection.send(Stepped(reports, engine_load))


def _answer_of(request_id: str, done: "Future[GenerationResult]") -> Finished | Failed:
    if done.cancelled():
        return Failed(request_id, RequestCancelled("cancelled before it was begun"))
    error = done.exception()
    if error is None:
        return Finished(request_id, done.result())
    if isinstance(error, EngineError):
        # Causes hold tensors and frames; the pipe carries what the error says, not where it came from.
        error.__cause__ = None
        return Failed(request_id, error)
    logger.error("engine fault: %s", "".join(traceback.format_exception(error))[-4000:])
    return Failed(request_id, EngineFault(f"{type(error).__name__}: {error}"))


def _die_with(*, parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that spawned it ends, which is when the supervisor does."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        # The parent died before the line above took hold: no signal will come any more.
        sys.exit(1)


if __name__ == "__main__":
    main()
