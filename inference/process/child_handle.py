"""The parent's handle of the engine's child: the process and this end of the pipe."""

import os
import queue
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from config.model import ModelSettings
from config.visible_gpus import gpu_variables
from inference.process.pixels import receive_pixels
from inference.process.protocol import Finished, FromChild, Stop, ToChild

STOP_SECONDS = 2.0
ROOT = str(Path(__file__).parents[2])

# The child parses untrusted files: it gets none of the supervisor's credentials.
SECRET_VARIABLES = frozenset(
    (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "INTERNAL_API_TOKEN",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "RABBITMQ_PASS",
        "RABBITMQ_URL",
        "WEBHOOK_SIGNING_SECRET",
    )
)


def path_variables() -> dict[str, str]:
    """Return variables by which a child imports our modules, and none from the working directory.

    `-m` puts that directory on the path, and its config.py or json.py would be imported in place of ours. Where this
    process itself was started by `-m` in a checkout that is not installed, the child is given the checkout by name.
    """
    variables = {"PYTHONSAFEPATH": "1"}
    if sys.path[0] == ROOT:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    return variables


class ChildHandle:
    """One child process, and owner of the thread that sends to it. It dies with the *thread* that spawned it: see
    `die_with_parent`."""

    def __init__(self, process: "subprocess.Popen[bytes]", connection: "Connection[ToChild, FromChild]") -> None:
        self.process = process
        self.connection = connection
        self._outbox: queue.SimpleQueue[ToChild | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="engine-sender", daemon=True)
        self._sender.start()

    @classmethod
    def spawn(cls, settings: ModelSettings, *, module: str = "inference.process.child") -> Self:
        """Start a child without secrets, in a session of its own: Ctrl-C in a terminal does not reach it."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())]
            environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
            # The settings read `.env` without exporting it. The child sees one GPU, as number 0: everything on the
            # current device (events, pinned memory, streams, a library's calls) is on the right one.
            environment |= path_variables() | gpu_variables(settings.device, settings.cuda_visible_devices)
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        return cls(process, Connection(ours.detach()))

    def send(self, message: ToChild) -> None:
        """Queue a message for the sending thread. Never blocks.

        Requests with pictures are larger than the pipe: a thread that waited for the child to read them could not read
        the child's messages in that time, and would not notice that it hangs.
        """
        self._outbox.put(message)

    def receive(self) -> FromChild | None:
        """Return the next message; None where the child is gone or the position in the stream is lost."""
        try:
            message = self.connection.recv()
            return receive_pixels(self.connection, message) if isinstance(message, Finished) else message
        except (EOFError, OSError, MemoryError):
            return None

    def end(self, *, is_idle: bool) -> None:
        """End the process: an idle child gets `Stop` first, any that is left is killed."""
        if is_idle:
            self.send(Stop())
            with suppress(subprocess.TimeoutExpired):  # stuck: killed below
                self.process.wait(STOP_SECONDS)
        self.process.kill()
        self.process.wait()
        # The pipe has no reader any more: a send in progress has failed.
        self._outbox.put(None)
        self._sender.join()
        self.connection.close()

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            with suppress(OSError):  # a dead child is noticed in `receive`, after its last message
                self.connection.send(message)
