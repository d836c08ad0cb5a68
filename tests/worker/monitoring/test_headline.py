"""The headline says what is, in one sentence."""

from typing import Any

import pytest

from worker.monitoring.headline import headline
from worker.monitoring.readiness import ENGINE_LOADING, STOPPING

QUIET = {"why_not_ready": "", "idle_reason": "no_jobs", "num_lanes": 0, "num_jobs": 0, "num_restarts": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Waiting for jobs"),
        ({"idle_reason": None, "num_lanes": 10, "num_jobs": 7}, "Drawing 10 images"),
        ({"idle_reason": None, "num_lanes": 1, "num_jobs": 1}, "Drawing 1 image"),
        # Lanes are counted at the end of each forward, so not yet in the first.
        ({"idle_reason": None, "num_lanes": 0, "num_jobs": 1}, "Drawing 1 image"),
        ({"idle_reason": "decoding", "num_jobs": 2}, "Decoding the last images"),
        ({"idle_reason": "encoding", "num_jobs": 2}, "Preparing prompts and adapters"),
        ({"idle_reason": "fetching", "num_jobs": 2}, "Fetching files for the next jobs"),
        ({"num_jobs": 1}, "Storing and reporting finished images"),
        ({"why_not_ready": ENGINE_LOADING, "idle_reason": "engine_starting"}, "Loading the model"),
        (
            {"why_not_ready": ENGINE_LOADING, "idle_reason": "engine_starting", "num_restarts": 1},
            "Loading the model again after a crash",
        ),
        (
            {"why_not_ready": "the broker is not connected", "idle_reason": "broker_down"},
            "Not taking jobs: the broker is not connected",
        ),
        (
            {"why_not_ready": "the store refuses this worker", "idle_reason": None, "num_lanes": 3},
            "Not taking jobs: the store refuses this worker",
        ),
        ({"why_not_ready": STOPPING, "idle_reason": None, "num_lanes": 2, "num_jobs": 3}, "Stopping: 3 jobs to finish"),
        ({"why_not_ready": STOPPING}, "Stopping"),
    ],
)
def test_headline_says_what_the_worker_does(changes: dict[str, Any], said: str) -> None:
    assert headline(**QUIET | changes) == said
