"""End a child process with its parent."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the *thread* that spawned it ends; raise `SystemExit` if it has already.

    A parent that died before the call leaves this process to another one: the signal would never come.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        raise SystemExit("the parent process is gone")
