"""Dispatch of deliveries: attach to a running job, move to another queue, dead-letter, or start a job."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from config.logs import log_event
from worker.amqp.delivery import Delivery
from worker.amqp.topology import QueueNames
from worker.jobs.cancellations import Cancellations
from worker.jobs.disposition import Disposition
from worker.jobs.leases import Lease, LeaseKeeper, Leases
from worker.jobs.recovery import CrashCounter, SuspectIsolation, is_suspect
from worker.jobs.runner import JobRunner
from worker.jobs.runs import Runs
from worker.jobs.settler import Settler
from worker.messages.cancel import decode_cancel
from worker.messages.decoder import decode_any
from worker.messages.identity import TaskIdTaken, own_task_id, with_own_id
from worker.messages.job import Job, JobRejected, Undecodable
from worker.messages.rules import JobRules
from worker.metrics import Metrics
from worker.outcome import Outcome

logger = logging.getLogger(__name__)

# Moving a redelivered message or dead-lettering a broken one must not wait for a job's thread.
NUM_SPARE_THREADS = 2
LEASE_RECHECK_SECONDS = 1.0


class Dispatcher:
    """Owner of the job threads. The consuming thread calls the `on_…` methods, which never block: all that waits for
    the broker, the store or the engine runs on job threads. `num_taken` counts the deliveries from queues of jobs."""

    def __init__(
        self,
        *,
        rules: JobRules,
        runs: Runs,
        runner: JobRunner,
        settler: Settler,
        isolation: SuspectIsolation,
        names: QueueNames,
        metrics: Metrics,
        num_threads: int,
        is_draining: threading.Event,
        cancellations: Cancellations,
        leases: Leases,
        lease_keeper: LeaseKeeper,
        on_bug: Callable[[], None],
    ) -> None:
        self._rules = rules
        self._runs = runs
        self._runner = runner
        self._settler = settler
        self._isolation = isolation
        self._names = names
        self._metrics = metrics
        self._is_draining = is_draining
        self._cancellations = cancellations
        self._leases = leases
        self._lease_keeper = lease_keeper
        self._on_bug = on_bug
        self._threads = ThreadPoolExecutor(num_threads + NUM_SPARE_THREADS, thread_name_prefix="job")
        self._crashes = CrashCounter()
        self._num_tasks = 0
        self.num_taken = 0
        self._tasks_lock = threading.Lock()
        self._closing = threading.Lock()
        self._is_closed = False

    @property
    def has_tasks(self) -> bool:
        """Whether a job thread has work: a run, or a delivery that is being passed on."""
        return self._num_tasks > 0

    def release_waiting(self) -> None:
        """Release every job that is not being denoised yet."""
        for run in self._runs.all():
            if run.future is not None:
                run.future.cancel()

    def close(self) -> None:
        """Wait for the job threads to end."""
        with self._closing:
            self._is_closed = True
        self._threads.shutdown(wait=True)

    def on_delivery(self, delivery: Delivery) -> None:
        """Attach to a running job, move to `recover`, dead-letter, or start a job. Never blocks, as the consuming
        thread also sends heartbeats."""
        is_from_jobs = delivery.queue in self._names.job_queues
        self.num_taken += is_from_jobs
        try:
            decoded = decode_any(delivery.body, self._rules)
        except Undecodable as error:
            self._submit(self._dead_letter, delivery, str(error))
            return

        # A message that was delivered before may be what killed a worker: it moves to where deliveries are counted.
        is_recovered = delivery.is_redelivered and is_from_jobs
        if is_recovered and decoded.task_id not in self._runs:
            self._submit(self._settler.move, delivery, self._names.recover)
        elif delivery.queue == self._names.recover:
            self._recover(decoded, delivery)
        else:
            self._attach_or_start(decoded, delivery)

    def _recover(self, decoded: Job | JobRejected, delivery: Delivery) -> None:
        """Attach, count, postpone or start a message of `recover`."""
        num_crashes = self._crashes.num_crashes(delivery)
        if self._runs.has_copy_of(decoded.task_id, replace(delivery, num_crashes=num_crashes, num_deliveries=0)):
            # A lost ack leaves a second copy of a message, and each further loss would double them.
            self._settler.settle(delivery, Disposition.ACK)
            return
        is_admitted = self._isolation.enter(delivery)
        if delivery.num_deliveries > 0 or num_crashes != delivery.num_crashes:
            # The count goes on in the copy's header: a broker or a policy may drop a message at any count of its own.
            counted = replace(delivery, num_crashes=num_crashes, num_deliveries=0)
            self._submit(self._settler.move, counted, self._names.recover)
        elif decoded.task_id in self._runs:
            self._attach_or_start(decoded, delivery)
        elif not is_admitted:
            # Delivered again in some seconds, here or to another worker.
            self._submit(self._settler.move, delivery, self._names.lease)
        else:
            # The worker that it was delivered to before may still run it.
            self._submit(self._start_unless_leased, decoded, delivery)

    def _attach_or_start(self, decoded: Job | JobRejected, delivery: Delivery) -> None:
        try:
            run = self._runs.attach_or_start(decoded, delivery)
        except TaskIdTaken as error:
            self._start_under_own_id(decoded, delivery, error)
            return
        if run is None:
            self._metrics.count_job(Outcome.ADOPTED)
            log_event(logger, "delivery adopted", task_id=decoded.task_id, is_redelivered=delivery.is_redelivered)
        else:
            self._submit(self._runner.run, run, partial(self._start_under_own_id, decoded))

    def _start_under_own_id(self, decoded: Job | JobRejected, delivery: Delivery, why: TaskIdTaken) -> None:
        """Start a job whose task id is another generation's as if it had come without one."""
        renamed = with_own_id(decoded)
        log_event(
            logger,
            "task id replaced",
            logging.WARNING,
            task_id=renamed.task_id,
            generation_id=renamed.generation_id,
            reason=str(why),
        )
        self._attach_or_start(renamed, delivery)

    def on_cancel(self, body: bytes) -> None:
        """Cancel the running jobs that the order names, and remember it for later ones."""
        try:
            order = decode_cancel(body)
        except Undecodable as error:
            log_event(logger, "cancel order ignored", logging.WARNING, reason=str(error))
            return
        self._cancellations.remember(order)
        cancelled = [run for run in self._runs.all() if order.names(run.task_id, run.generation_id)]
        for run in cancelled:
            run.cancel()
        log_event(
            logger,
            "cancel order",
            task_id=order.task_id,
            generation_id=order.generation_id,
            num_runs=len(cancelled),
        )

    def on_lost(self) -> None:
        """Note on all running jobs that they run here: the broker may now deliver them to other workers."""
        with self._closing:
            if not self._is_closed:
                self._submit(self._lease_keeper.note_all)

    def _submit(self, work: Callable[..., None], *args: object) -> None:
        self._count_tasks(1)
        self._threads.submit(self._do, work, *args)

    def _count_tasks(self, change: int) -> None:
        with self._tasks_lock:
            self._num_tasks += change

    def _do(self, work: Callable[..., None], *args: object) -> None:
        """Call `work` and report its errors: the pool keeps an exception in a future that is never read."""
        try:
            work(*args)
        except Exception:
            logger.exception("a job thread failed; its delivery stays with the broker")
            self._on_bug()
        finally:
            self._count_tasks(-1)

    def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        self._settler.dead_letter(delivery, reason)
        self._metrics.count_job(Outcome.UNDECODABLE)

    def _start_unless_leased(self, decoded: Job | JobRejected, delivery: Delivery) -> None:
        """Start the job, unless another worker holds its lease: then the message goes back to the lease queue."""
        lease = self._find_lease(decoded)
        # A worker that has just lost its connection needs a moment to note that its job goes on.
        if not (delivery.is_leased or (lease and lease.is_held) or self._is_draining.wait(LEASE_RECHECK_SECONDS)):
            lease = self._find_lease(decoded)
        if lease is not None and lease.is_held:
            leased = replace(delivery, is_leased=True, num_crashes=lease.num_crashes, num_deliveries=0)
            self._settler.move(leased, self._names.lease)
            return
        if delivery.is_leased and lease is not None:
            # A worker that stops in order deletes its note: this one was killed while its copy was in the queue.
            delivery = replace(delivery, num_crashes=delivery.num_crashes + 1, is_leased=False)
        if is_suspect(delivery) and not self._isolation.isolate(delivery, self._is_draining):
            self._settler.move(delivery, self._names.lease)
        elif self._settler.holds(delivery):
            self._attach_or_start(decoded, delivery)
        else:
            self._settler.settle(delivery, Disposition.RELEASE)  # the broker delivers it again

    def _find_lease(self, decoded: Job | JobRejected) -> Lease | None:
        """Return the lease of the job, which may run under the id that replaced a taken one."""
        own_id = own_task_id(decoded.task_id, decoded.generation_id)
        return self._leases.find(decoded.task_id) or self._leases.find(own_id)
