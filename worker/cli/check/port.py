"""Check the port of health, metrics and the status page, and find the process that holds it."""

import errno
import json
import socket
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from worker.cli.check.checks import CheckFailed

ANSWER_SECONDS = 3.0
MAX_ANSWER_BYTES = 1_000_000
LISTENING = "0A"
FIRST_UNPRIVILEGED = 1024


def check_port(port: int) -> str:
    """Bind it for a moment, as the worker does. A worker that runs here already is named, and is no failure."""
    if port == 0:
        return "METRICS_PORT is 0: a free one is taken at the start, and told in the log"
    try:
        # As the HTTP server's socket: connections in TIME_WAIT do not count.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("0.0.0.0", port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and (worker := _worker_at(port)):
            return (
                f"{port} is served by the worker {worker}, which runs already: another needs a METRICS_PORT of its own"
            )
        raise CheckFailed(explain_bind_error(port, error)) from error
    return f"{port} is free; the status page will be at http://localhost:{port}/"


def explain_bind_error(port: int, error: OSError) -> str:
    """Explain why the port cannot be used, and what to do; `error` is what binding it raised."""
    if error.errno == errno.EADDRINUSE:
        worker = _worker_at(port)
        whose = f"the worker {worker}, which runs already" if worker else _holder(port) or "another program"
        return f"METRICS_PORT {port} is in use by {whose}: name another port, or 0 for a free one"
    if error.errno == errno.EACCES and port < FIRST_UNPRIVILEGED:
        return f"METRICS_PORT {port} is only for root: name one from {FIRST_UNPRIVILEGED} on"
    return f"METRICS_PORT {port} cannot be used ({error.strerror}): name another port"


def _worker_at(port: int) -> str:
    """Return the name of the Darkroom worker that answers there; empty for anything else."""
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/status.json")
        status = json.loads(connection.getresponse().read(MAX_ANSWER_BYTES))
    except (OSError, HTTPException, ValueError, RecursionError):
        return ""
    finally:
        connection.close()
    worker = status.get("worker") if isinstance(status, dict) else None
    return str(worker.get("name", ""))[:100] if isinstance(worker, dict) else ""


def _holder(port: int) -> str:
    """Return the process that listens there; empty where this user may not see it."""
    sockets: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            listening = [row for row in rows if row[3] == LISTENING and int(row[1].rpartition(":")[2], 16) == port]
            sockets |= {f"socket:[{row[9]}]" for row in listening}  # by inode
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has gone, or is another user's
            if sockets and any(_target(file) in sockets for file in (process / "fd").iterdir()):
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


def _target(file: Path) -> str:
    """Return what an open file of a process is; empty where it has been closed since it was listed."""
    try:
        return str(file.readlink())
    except OSError:
        return ""
