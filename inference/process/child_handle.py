"""The engine's child as its parent holds it: a process and this end of the pipe."""

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
from inference.process.protocol import FromChild, Stop, ToChild

STOP_SECONDS = 2.0
ROOT = str(Path(__file__).parents[2])

# The child parses files that strangers wrote: it gets none of the supervisor's credentials.
SECRET_VARIABLES = frozenset(
    (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "INTERNAL_API_TOKEN",
        "RABBITMQ_PASS",
        "RABBITMQ_URL",
        "WEBHOOK_SIGNING_SECRET",
    )
)


def path_variables() -> dict[str, str]:
    """Variables that have a child find our modules, and none of the working directory.

    `-m` puts that directory on the path, and its config.py or json.py would be imported in place of ours. Where this
    process itself was started by `-m` in a checkout that is not installed, the child is given the checkout by name.
    """
    variables = {"PYTHONSAFEPATH": "1"}
    if sys.path[0] == ROOT:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    return variables


class ChildHandle:
    """One child process, and owner of the thread that sends to it. It dies with the *thread* that spawned it: see
    `inference.process.child`."""

    def __init__(self, process: "subprocess.Popen[bytes]", connection: "Connection[ToChild, FromChild]") -> None:
        self.process = process
        self.connection = connection
        self._outbox: queue.SimpleQueue[ToChild | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="engine-sender", daemon=True)
        self._sender.start()

    @classmethod
    def spawn(cls, settings: ModelSettings, *, module: str = "inference.process.child") -> Self:
        """Start a child without secrets, in a session of its own, so that Ctrl-C in a terminal spares it."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())]
            environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
            # The settings read `.env` without exporting it. The child sees one GPU, as number 0: whatever is done on
            # the current device (events, pinned memory, streams, what a library asks of it) is done on the right one.
            environment |= path_variables() | gpu_variables(settings.device, settings.cuda_visible_devices)
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        return cls(process, Connection(ours.detach()))

    def send(self, message: ToChild) -> None:
        """Have it sent, behind those before it. Requests with pictures are larger than the pipe: whoever waited for the
        child to read them could not read what it says meanwhile, and never learn that it hangs."""
        self._outbox.put(message)

    def end(self, *, is_idle: bool) -> None:
        """Leave no process behind: ask an idle child to go, kill any that is there after that."""
        if is_idle:
            self.send(Stop())
            with suppress(subprocess.TimeoutExpired):  # stuck: the kill below settles it
                self.process.wait(STOP_SECONDS)
        self.process.kill()
        self.process.wait()
        # With nobody there to read it, what is being sent has ended too.
        self._outbox.put(None)
        self._sender.join()
        self.connection.close()

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            with suppress(OSError):  # a dead child shows where it is read, behind the last that it said
                self.connection.send(message)
