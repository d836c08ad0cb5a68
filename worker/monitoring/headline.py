"""The headline of the status page: what the worker does now, in one sentence."""

from worker.monitoring.readiness import ENGINE_LOADING, STOPPING

# While nothing is being denoised.
OF_REASON = {
    "switching_model": "Bringing another model to the GPU",
    "decoding": "Decoding the last images",
    "encoding": "Preparing prompts and adapters",
    "fetching": "Fetching files for the next jobs",
}


def headline(*, why_not_ready: str, idle_reason: str | None, num_lanes: int, num_jobs: int, num_restarts: int) -> str:
    """Return what the worker does; `num_jobs` are in its hands, `num_lanes` images of theirs being denoised. Pure."""
    if why_not_ready == STOPPING:
        return f"Stopping: {_count(num_jobs, 'job')} to finish" if num_jobs else "Stopping"
    if why_not_ready == ENGINE_LOADING:
        return "Loading the model again after a crash" if num_restarts else "Loading the model"
    if why_not_ready:
        return f"Not taking jobs: {why_not_ready}"
    if idle_reason is None:
        return f"Drawing {_count(max(1, num_lanes), 'image')}"
    if idle_reason in OF_REASON:
        return OF_REASON[idle_reason]
    return "Storing and reporting finished images" if num_jobs else "Waiting for jobs"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
