"""Starts a process of its own, and neither ends."""

import subprocess

from benchmarks.gpu.stage import Context


def run(context: Context) -> None:
    process = subprocess.Popen(["sleep", "1000"])
    context.record("its process", pid=process.pid)
    process.wait()
