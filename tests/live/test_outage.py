"""A backend that is down for a while, as deployments are: the short form here, two minutes by `make outage`.

The engine runs without torch: what counts is how long jobs and ends wait.
"""

import os
import time
from pathlib import Path

from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.faults.station import start_light_worker
from tests.support.world import eventually, new_world

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "4"))
# The short form has shorter waits between two calls, too.
CONSTANTS = (
    {}
    if "OUTAGE_SECONDS" in os.environ
    else {"worker.results.notifier:DELAYS_SECONDS": (0.5, 1.0, 3.0), "worker.results.notifier:PATIENCE_SECONDS": 2.0}
)
NUM_JOBS = 6
STEPS = 8


def test_outage_of_the_backend_delays_no_image_and_every_end_arrives(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        worker = start_light_worker(world, constants=CONSTANTS)
        # Given a backend that stops
        world.backend.stop()
        deadline = time.monotonic() + OUTAGE_SECONDS

        # When jobs go on coming, each is drawn and stored at once, and leaves the queue
        generation_ids = []
        for _ in range(NUM_JOBS):
            generation_id = world.publish(num_inference_steps=STEPS)
            generation_ids.append(generation_id)
            key = f"generations/gen-{generation_id}.png"
            eventually(lambda wanted=key: wanted in world.keys("generations/"), worker.log_tail)  # type: ignore[misc]
            time.sleep(OUTAGE_SECONDS / NUM_JOBS / 2)
        eventually(lambda: sum(world.queues()[".outbox"]) == NUM_JOBS, lambda: str(world.queues()))
        world.wait_for_depth(0, 0)
        time.sleep(max(0.0, deadline - time.monotonic()))

        # Then, once it is back, it hears of every one within a minute, once, and nothing is drawn again
        world.backend.start()
        back_at = time.monotonic()
        for generation_id in generation_ids:
            assert world.wait_for_end(generation_id).kind == "complete"
        assert time.monotonic() - back_at < 60
        world.wait_until_clean()
        assert len(world.backend.calls("complete")) == NUM_JOBS
        assert worker.metric("darkroom_denoise_lane_steps_total") == NUM_JOBS * STEPS
