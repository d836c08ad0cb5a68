"""The engine's own process: `python -m inference.child FD PARENT_PID`, started by `EngineProcess` and by nobody else.

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
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from config.logs import configure_logging
from inference.request import EngineError, EngineFault, EngineStartFailed, GenerationResult, StepReport
from inference.wire import Cancel, Failed, Finished, FromChild, Generate, Ready, Start, StartFailed, Stepped, Stop

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Load the model, say so, then serve until the pipe ends."""
    connection: Connection[FromChild, Any] = Connection(int(sys.argv[1]))
    _die_with(parent_pid=int(sys.argv[2]))
    start: Start = connection.recv()
    configure_logging(start.log_level)
    try:
        from inference.engine import LocalEngine  # noqa: PLC0415 - torch takes seconds: only after the lines above

        engine = LocalEngine(start.settings)
    except EngineStartFailed as error:
        connection.send(StartFailed(str(error)))
        return

    connection.send(Ready(engine.facts))
    _Server(connection, engine).serve()
    engine.close()


class _Server:
    """Reads requests on the main thread; the engine's thread writes steps and results, one at a time."""

    def __init__(self, connection: "Connection[FromChild, Any]", engine: Any) -> None:
        self._connection = connection
        self._engine = engine
        self._writing = threading.Lock()
        self._cancelled: dict[str, threading.Event] = {}

    def serve(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except EOFError:
                return
            match message:
                case Generate(request):
                    self._generate(request.request_id, message)
                case Cancel(request_id):
                    if request_id in self._cancelled:
                        self._cancelled[request_id].set()
                case Stop():
                    return

    def _generate(self, request_id: str, message: Generate) -> None:
        cancelled = self._cancelled[request_id] = threading.Event()

        def on_step(report: StepReport) -> None:
            self._send(Stepped(request_id, report))

        future = self._engine.generate(message.request, on_step, cancelled.is_set)
        future.add_done_callback(lambda done: self._finish(request_id, done))

    def _finish(self, request_id: str, done: "Future[GenerationResult]") -> None:
        self._cancelled.pop(request_id, None)
        error = done.exception()
        if error is None:
            self._send(Finished(request_id, done.result()))
        elif isinstance(error, EngineError):
            # Causes hold tensors and frames; the pipe carries what the error says, not where it came from.
            error.__cause__ = None
            self._send(Failed(request_id, error))
        else:
            logger.error("engine fault: %s", "".join(traceback.format_exception(error))[-4000:])
            self._send(Failed(request_id, EngineFault(f"{type(error).__name__}: {error}")))

    def _send(self, message: FromChild) -> None:
        with self._writing:
            self._connection.send(message)


def _die_with(*, parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that spawned it ends, which is when the supervisor does."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        # The parent died before the line above took hold: no signal will come any more.
        sys.exit(1)


if __name__ == "__main__":
    main()
