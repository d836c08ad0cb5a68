"""The engine's own process: `python -m inference.process.child FD PARENT_PID`. `EngineProcess` starts it.

It has no secret, opens no connection, and is killed with the supervisor. A segfault, a sticky CUDA error or a hung step
costs this process alone.
"""

import gc
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from config.logs import configure_logging, log_event
from config.model import ModelSettings
from inference.errors import EngineError, EngineFault, EngineStartFailed, RequestCancelled
from inference.process.parent_death import die_with_parent
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
from inference.request import NO_LOAD, EngineLoad, GenerationRequest, GenerationResult, OnLoadReport, StepReport

logger = logging.getLogger(__name__)

# The device is beyond recovery in this process (sysexits' EX_SOFTWARE): the next one gets its requests.
EXIT_BROKEN = 70


def _load_local_engine(settings: ModelSettings, on_load_report: OnLoadReport) -> Any:
    from inference.engine.local_engine import LocalEngine  # noqa: PLC0415 - torch takes seconds: only once logging is set up

    return LocalEngine(settings, on_load_report)


@contextmanager
def loading() -> Iterator[None]:
    """Keep the garbage collector from what is loaded meanwhile, now and later.

    Half a million objects of torch, diffusers and the model stay for good. Going through them took a sixth of the CPU
    of a start, and 0.3 s in the middle of a step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main(load: Callable[[ModelSettings, OnLoadReport], Any] = _load_local_engine) -> None:
    """Load the model, send `Ready` or `StartFailed`, and serve until `Stop` or the end of the pipe."""
    connection: Connection[FromChild, Any] = Connection(int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    start: Start = connection.recv()
    configure_logging(start.log_level, start.log_format)
    server = _Server(connection)
    try:
        with loading():
            engine = load(start.settings, server.on_load_report)
    except EngineStartFailed as error:
        connection.send(StartFailed(str(error)))
        return

    connection.send(Ready(engine.facts_by_model))
    server.serve(engine)
    engine.close()


class _Unanswered(NamedTuple):
    """The two ways to cancel a request: by the event once it has begun, by the future before."""

    cancelled: threading.Event
    future: "Future[GenerationResult]"


class _Server:
    """Reads requests on the main thread and writes on the engine's: step reports at the end of their turn or before the
    next answer, so that no report follows its request's answer."""

    def __init__(self, connection: "Connection[FromChild, Any]") -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self._unanswered: dict[str, _Unanswered] = {}
        self._has_begun = False
        self._reports: list[tuple[str, StepReport]] = []
        self._engine_load = NO_LOAD

    def serve(self, engine: Any) -> None:
        """Handle messages until `Stop` or the end of the pipe."""
        while True:
            try:
                message = self._connection.recv()
            except EOFError:
                return
            match message:
                case Generate(request):
                    self._generate(engine, request)
                case Cancel(request_id):
                    unanswered = self._unanswered.get(request_id)
                    if unanswered is not None:
                        unanswered.cancelled.set()
                        unanswered.future.cancel()
                case Stop():
                    return

    def on_load_report(self, engine_load: EngineLoad) -> None:
        """Send the turn's step reports, and the engine's load where it has changed."""
        if not self._has_begun:
            return  # the warm-up's turns are of no request
        with self._writing:
            if self._reports or engine_load.num_batched or engine_load != self._engine_load:
                self._engine_load = engine_load
                self._send_reports(engine_load)

    def _generate(self, engine: Any, request: GenerationRequest) -> None:
        self._has_begun = True
        cancelled = threading.Event()
        try:
            future = engine.generate(request, partial(self._on_step, request.request_id), cancelled.is_set)
        except Exception as error:  # noqa: BLE001 - the request's answer: the reading thread must survive it
            future = Future()
            future.set_exception(error)
        # Before the callback is added: it may run at once, and removes the entry.
        self._unanswered[request.request_id] = _Unanswered(cancelled, future)
        future.add_done_callback(partial(self._answer, engine, request.request_id))

    def _on_step(self, request_id: str, report: StepReport) -> None:
        with self._writing:
            self._reports.append((request_id, report))

    def _answer(self, engine: Any, request_id: str, done: "Future[GenerationResult]") -> None:
        if engine.is_broken:
            log_event(logger, "engine broken", logging.ERROR)
            logging.shutdown()  # flushes: os._exit does not
            os._exit(EXIT_BROKEN)
        del self._unanswered[request_id]
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
        # Causes hold tensors and frames: they are not sent.
        error.__cause__ = None
        return Failed(request_id, error)
    logger.error("engine fault: %s", "".join(traceback.format_exception(error))[-4000:])
    return Failed(request_id, EngineFault(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
