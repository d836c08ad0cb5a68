"""RunPod's serverless handler: a request wakes a worker, which drains the RabbitMQ queue and ends.

`{"input": {"exit_when_idle": 60}}`: the seconds without a job after which it ends.
`{"input": {"version": true}}` tells the version and starts nothing.
"""

import subprocess
from typing import Any

DEFAULT_SECONDS = 60


def handler(event: dict[str, Any]) -> dict[str, Any]:
    """Run a worker to its end. RunPod counts a request as failed whose answer has an `error`."""
    given = event.get("input", {})
    if given.get("version"):
        return {"version": subprocess.run(["darkroom", "--version"], check=True, capture_output=True, text=True).stdout}
    seconds = given.get("exit_when_idle", DEFAULT_SECONDS)
    exit_code = subprocess.run(["darkroom", "run", "--exit-when-idle", str(seconds)], check=False).returncode
    if exit_code:
        return {"error": f"the worker ended with exit code {exit_code}: see its log"}
    return {"exit_code": 0}


if __name__ == "__main__":
    import runpod

    runpod.serverless.start({"handler": handler})
