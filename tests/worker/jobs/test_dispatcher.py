"""Deliveries on their way to a job's thread, and what is counted of them."""

import threading
from dataclasses import replace
from typing import Any, cast

from clients.storage.location import ObjectRef
from tests.worker.jobs.test_runs import delivered
from worker.amqp.delivery import Delivery
from worker.amqp.topology import QueueNames
from worker.jobs.dispatcher import Dispatcher
from worker.jobs.recovery import SuspectIsolation
from worker.jobs.runs import Runs
from worker.messages.rules import JobRules
from worker.metrics import Metrics

NAMES = QueueNames("image_generation", others=("express",))


class LetterKeeper:
    """A settler that keeps what it dead-letters."""

    def __init__(self) -> None:
        self.letters: list[Delivery] = []

    def dead_letter(self, delivery: Delivery, _reason: str) -> None:
        self.letters.append(delivery)


def test_what_is_no_job_counts_as_taken_where_it_came_from_a_queue_of_jobs() -> None:
    """More of them, and jobs behind them, may wait there: a worker that ends when it is idle is not."""
    nothing, settler = cast("Any", None), LetterKeeper()
    dispatcher = Dispatcher(
        rules=JobRules(None, None, locate=lambda text: ObjectRef("media", text)),
        runs=Runs(),
        runner=nothing,
        settler=cast("Any", settler),
        isolation=SuspectIsolation(),
        names=NAMES,
        metrics=Metrics(),
        num_threads=1,
        is_draining=threading.Event(),
        cancellations=nothing,
        leases=nothing,
        lease_keeper=nothing,
        on_bug=nothing,
    )

    for queue in (*NAMES.job_queues, NAMES.recover):
        dispatcher.on_delivery(replace(delivered(1), body=b"no job", queue=queue))
    dispatcher.close()

    assert (dispatcher.num_taken, len(settler.letters)) == (2, 3)
