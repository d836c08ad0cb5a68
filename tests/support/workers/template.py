"""A process that has imported all that a worker does, and forks one for each line of its standard input.

A line is JSON: the `arguments` behind `darkroom`, the `env`, the working `folder`, the `log` that takes both outputs.
Its answers are lines as well: {"started": pid}, and for each that has ended {"ended": pid, "code": exit code}.
"""

import gc
import json
import os
import selectors
import signal
import sys

import worker.cli.main
import worker.supervisor

STDIN, STDOUT, STDERR = range(3)


def tell(**fields: int) -> None:
    os.write(STDOUT, json.dumps(fields).encode() + b"\n")


def serve() -> None:
    """Return in each fork, which is then a worker's process to be; the template itself ends with its input."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    with selectors.DefaultSelector() as selector:
        for descriptor in (STDIN, woken):
            selector.register(descriptor, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == woken:
                    os.read(woken, 4096)
                    tell_who_ended()
                    continue
                line = sys.stdin.buffer.raw.readline()  # type: ignore[attr-defined]
                if not line:
                    sys.exit(0)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.close(woken)
                    os.close(wakes)
                    become(**json.loads(line))
                    return
                tell(started=pid)


def tell_who_ended() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        tell(ended=pid, code=os.waitstatus_to_exitcode(status))


def become(*, arguments: list[str], env: dict[str, str], folder: str, log: str) -> None:
    """Give this process what a new one would have been started with."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, path, flags in (
        (STDIN, os.devnull, os.O_RDONLY),
        (STDOUT, log, os.O_WRONLY | os.O_APPEND),
        (STDERR, log, os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["darkroom", *arguments]


if __name__ == "__main__":
    gc.freeze()
    serve()
    worker.cli.main.main()
