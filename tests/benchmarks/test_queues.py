"""The order of starts of a whole worker that consumes two queues by weight."""

from pathlib import Path

from benchmarks.queues import EXPRESS, NUM_LANES, ORDINARY, longest_gap, start_order
from examples.parts.rabbitmq import RabbitMQ
from examples.parts.seaweedfs import SeaweedFS
from tests.support.world import new_world

NUM_EXPRESS = 15
# Jobs start on threads of their own: as many as there are places may pass one another on their way to the log.
PLACES = NUM_LANES + 2


def test_express_jobs_have_three_of_four_starts_and_ordinary_ones_the_fourth(
    rabbitmq: RabbitMQ, s3_server: SeaweedFS, tmp_path: Path
) -> None:
    classes = [ORDINARY, EXPRESS, ORDINARY, ORDINARY] * NUM_EXPRESS
    with new_world(rabbitmq, s3_server, tmp_path) as world:
        starts = start_order(world, classes, weights=(3, 1))

    last_express = max(start.turn for start in starts if start.kind == EXPRESS)
    assert abs(last_express - NUM_EXPRESS * 4 / 3) <= PLACES
    assert longest_gap(starts, EXPRESS) <= 2 + PLACES
    assert longest_gap(starts, ORDINARY) <= 4 + PLACES
    assert [start.turn for start in starts if start.kind == ORDINARY][-1] == len(classes)
