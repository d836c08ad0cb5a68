"""The engine's child as its parent holds it: a process and this end of the pipe."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

from inference.wire import FromChild, Stop, ToChild

STOP_SECONDS = 2.0

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


@dataclass(frozen=True, slots=True)
class Child:
    """One child process. It dies with the *thread* that spawned it: see `inference.child`."""

    process: "subprocess.Popen[bytes]"
    connection: "Connection[ToChild, FromChild]"

    @classmethod
    def spawn(cls) -> Self:
        """A child without secrets, in a session of its own, so that Ctrl-C in a terminal spares it."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "inference.child", str(theirs.fileno()), str(os.getpid())]
            environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        return cls(process, Connection(ours.detach()))

    def end(self, *, is_idle: bool) -> None:
        """Leave no process behind: ask an idle child to go, kill any that is there after that."""
        if is_idle:
            try:
                self.connection.send(Stop())
                self.process.wait(STOP_SECONDS)
            except (ConnectionError, subprocess.TimeoutExpired):
                pass  # dead or stuck: the kill below settles both
        self.connection.close()
        self.process.kill()
        self.process.wait()
