"""From a delivery to its settling: the one path every message takes, and the only place that settles."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import tenacity

from clients.storage.errors import StorageError
from config.logs import bind, log_event
from worker.amqp.consumer import Consumer
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.breakers import StoreGate
from worker.errors import JobReleased
from worker.jobs.cancellations import Cancellations
from worker.jobs.disposition import Disposition, Verdict, judge
from worker.jobs.handler import JobHandler
from worker.jobs.history import History
from worker.jobs.leases import Lease, Leases
from worker.jobs.recovering import OwnReturns, Quarantine, is_suspect
from worker.jobs.runs import Run, Runs
from worker.messages.cancel import decode_cancel
from worker.messages.decoder import decode_any
from worker.messages.identity import TaskIdTaken, check_same, own_task_id, with_own_id
from worker.messages.job import Job, JobRejected, Undecodable
from worker.messages.rules import JobRules
from worker.metrics import Metrics
from worker.results.ledger import Ledger, RecordUnreadable
from worker.results.notifier import Notifier
from worker.results.terminal_event import CANCELLED, TerminalEvent, failed_event

logger = logging.getLogger(__name__)

# Moving a redelivered message or burying a broken one must not wait for a job's thread.
NUM_SPARE_THREADS = 2
MAX_DEAD_BODY_BYTES = 64 * 1024
SECOND_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Ending:
    """What a run came to: how its deliveries are settled, and the word for it in logs and metrics. `message` says why
    it failed."""

    disposition: Disposition
    outcome: str
    code: str = ""
    webhook: str = ""
    message: str = ""


class Processor:
    """Owner of the job threads. `on_delivery` is called by the consuming thread, all else happens on job threads."""

    def __init__(
        self,
        *,
        rules: JobRules,
        storyteller: JobHandler,
        ledger: Ledger,
        notifier: Notifier,
        publisher: Publisher,
        names: QueueNames,
        metrics: Metrics,
        num_threads: int,
        is_draining: threading.Event,
        cancellations: Cancellations,
        gate: StoreGate,
        leases: Leases,
        history: History,
        on_bug: Callable[[], None],
    ) -> None:
        self._rules = rules
        self._storyteller = storyteller
        self._ledger = ledger
        self._notifier = notifier
        self._publisher = publisher
        self._names = names
        self._metrics = metrics
        self._is_draining = is_draining
        self._cancellations = cancellations
        self._gate = gate
        self._leases = leases
        self._history = history
        self._on_bug = on_bug
        self._threads = ThreadPoolExecutor(num_threads + NUM_SPARE_THREADS, thread_name_prefix="job")
        self._consumer: Consumer | None = None
        self._own_returns = OwnReturns()
        self._quarantine = Quarantine()
        self.runs = Runs()

    def start(self, consumer: Consumer) -> None:
        """Name the consumer that deliveries come from and are settled with."""
        self._consumer = consumer

    def release_waiting(self) -> None:
        """Give back every job that has not begun to be drawn."""
        for run in self.runs.all():
            if run.future is not None:
                run.future.cancel()

    def close(self) -> None:
        """Wait for the job threads to end."""
        self._threads.shutdown(wait=True)

    def on_delivery(self, delivery: Delivery) -> None:
        """Adopt, move on, bury or begin. Returns at once; the consuming thread has heartbeats to send."""
        try:
            asked = decode_any(delivery.body, self._rules)
        except Undecodable as error:
            self._begin(self._bury, delivery, str(error))
            return

        # A message that was delivered before may be what killed a worker: it goes on where deliveries are counted.
        is_recovered = delivery.is_redelivered and delivery.queue == self._names.jobs
        if is_recovered and asked.task_id not in self.runs:
            self._begin(self._copy_to, self._names.recover, delivery)
            return
        if delivery.queue == self._names.recover:
            self._recover(asked, delivery)
            return
        self._join_or_begin(asked, delivery)

    def _recover(self, asked: Job | JobRejected, delivery: Delivery) -> None:
        """Adopt, renew, put off or begin a message out of `recover`."""
        num_crashes = self._own_returns.num_crashes(delivery)
        if self.runs.has_copy_of(asked.task_id, replace(delivery, num_crashes=num_crashes, num_deliveries=0)):
            # A lost ack leaves a second copy of a message, and each further loss would double them.
            self._settle(delivery, Disposition.ACK)
            return
        is_admitted = self._quarantine.enter(delivery)
        if delivery.num_deliveries > 0 or num_crashes != delivery.num_crashes:
            # The count goes on in the copy's header: a broker or a policy may drop a message at any count of its own.
            counted = replace(delivery, num_crashes=num_crashes, num_deliveries=0)
            self._begin(self._copy_to, self._names.recover, counted)
        elif asked.task_id in self.runs:
            self._join_or_begin(asked, delivery)
        elif not is_admitted:
            self._begin(self._copy_to, self._names.lease, delivery)  # back in some seconds, here or elsewhere
        else:
            # Where it comes from, another worker may still be at work on it.
            self._begin(self._follow_lease, asked, delivery)

    def _join_or_begin(self, asked: Job | JobRejected, delivery: Delivery) -> None:
        try:
            run = self.runs.join(asked, delivery)
        except TaskIdTaken as error:
            self._begin_under_own_id(asked, delivery, error)
            return
        if run is None:
            self._metrics.jobs.labels("adopted").inc()
            log_event(logger, "delivery adopted", task_id=asked.task_id, is_redelivered=delivery.is_redelivered)
        else:
            self._begin(self._work, run)

    def _begin_under_own_id(self, asked: Job | JobRejected, delivery: Delivery, why: TaskIdTaken) -> None:
        """Another generation has the message's task id: its job is done as if it had come without one."""
        renamed = with_own_id(asked)
        log_event(
            logger,
            "task id replaced",
            logging.WARNING,
            task_id=renamed.task_id,
            generation_id=renamed.generation_id,
            reason=str(why),
        )
        self._join_or_begin(renamed, delivery)

    def on_cancel(self, body: bytes) -> None:
        """Cancel what is here, and remember the order for what may come. Runs on the consuming thread."""
        try:
            order = decode_cancel(body)
        except Undecodable as error:
            log_event(logger, "cancel order ignored", logging.WARNING, reason=str(error))
            return
        self._cancellations.remember(order)
        cancelled = [run for run in self.runs.all() if order.names(run.task_id, run.generation_id)]
        for run in cancelled:
            run.cancel()
        log_event(
            logger,
            "cancel order",
            task_id=order.task_id,
            generation_id=order.generation_id,
            num_runs=len(cancelled),
        )

    def _begin(self, work: Callable[..., None], *args: object) -> None:
        self._threads.submit(self._do, work, *args)

    def _do(self, work: Callable[..., None], *args: object) -> None:
        """A thread pool keeps a task's exception in a future nobody reads; a bug must be seen."""
        try:
            work(*args)
        except Exception:
            logger.exception("a job thread failed; its delivery stays with the broker")
            self._on_bug()

    def _bury(self, delivery: Delivery, reason: str) -> None:
        self._elsewhere_first(
            delivery,
            lambda: self._notifier.dead_letter(delivery.body[:MAX_DEAD_BODY_BYTES], f"not a job: {reason}"),
        )
        self._metrics.jobs.labels("undecodable").inc()

    def _copy_to(self, queue: str, delivery: Delivery) -> None:
        """Replace the message by a confirmed copy, of which the broker has counted nothing."""

        def publish() -> None:
            # Of a lost session: the broker has the message itself again.
            if self._holds(delivery):
                self._publisher.publish(
                    queue,
                    delivery.body,
                    attempt=delivery.attempt,
                    is_leased=delivery.is_leased,
                    num_crashes=delivery.num_recoveries,
                )

        self._elsewhere_first(delivery, publish)

    def _follow_lease(self, asked: Job | JobRejected, delivery: Delivery) -> None:
        """A message whose job is at work somewhere waits on; one whose worker is gone is a job like any other."""
        lease = self._lease_of(asked)
        # A worker that has just lost its connection needs a moment to say that it goes on.
        if not (delivery.is_leased or (lease and lease.is_held) or self._is_draining.wait(SECOND_LOOK_SECONDS)):
            lease = self._lease_of(asked)
        if lease is not None and lease.is_held:
            self._keep_waiting(delivery, lease.num_crashes)
            return
        if delivery.is_leased and lease is not None:
            # A worker that stops in order takes its note away: this one was killed while its copy was in the queue.
            delivery = replace(delivery, num_crashes=delivery.num_crashes + 1, is_leased=False)
        if is_suspect(delivery) and not self._quarantine.isolate(delivery, self._is_draining):
            self._copy_to(self._names.lease, delivery)
        elif self._holds(delivery):
            self._join_or_begin(asked, delivery)
        else:
            self._settle(delivery, Disposition.RELEASE)  # it comes again

    def _lease_of(self, asked: Job | JobRejected) -> Lease | None:
        """The note on the job, which may be at work under the id that it got for one that was taken."""
        own_id = own_task_id(asked.task_id, asked.generation_id)
        return self._leases.find(asked.task_id) or self._leases.find(own_id)

    def _keep_waiting(self, delivery: Delivery, num_crashes: int) -> None:
        def keep() -> None:
            # Of a lost session: the broker has the message itself again.
            if self._holds(delivery):
                self._leases.keep_copy(delivery.body, delivery.attempt, num_crashes=num_crashes)

        self._elsewhere_first(delivery, keep)

    def on_lost(self) -> None:
        """The broker may give our jobs to others: say that they are at work here. Runs on the consuming thread."""
        if not self._is_draining.is_set():
            self._begin(self._note_all)

    def _note_all(self) -> None:
        self._lease_each(self._note_or_cancel)

    def _note_or_cancel(self, run: Run) -> None:
        """Say that the run goes on here, unless another worker ended its job while this one was frozen or cut off."""
        self._leases.note(run)
        if self._ledger.find(run.task_id) is not None:
            # The end of a cancelled run gives way to the one that is recorded.
            run.cancel()

    def go_on_lease(self) -> None:
        """Keep the messages of long jobs where no broker's timeout ends them, and say that the jobs are at work."""
        self._lease_each(self._take_or_renew)

    def _take_or_renew(self, run: Run) -> None:
        if self._leases.take_or_renew(run):
            for delivery in self.runs.part_from_deliveries(run):
                self._settle(delivery, Disposition.ACK)

    def _lease_each(self, lease: Callable[[Run], None]) -> None:
        for run in self.runs.all():
            try:
                lease(run)
                if run.lease_ends_at and run.task_id not in self.runs:
                    self._leases.give_up(run)
            except (PublishFailed, StorageError) as error:
                # Another worker may then draw it too; the ledger still lets only one end count.
                log_event(logger, "lease not taken", logging.WARNING, task_id=run.task_id, reason=str(error))

    def _elsewhere_first(self, delivery: Delivery, publish: Callable[[], None]) -> None:
        """Ack once a copy is confirmed elsewhere; give the message back where that cannot be."""
        try:
            self._surely(publish)
        except PublishFailed:
            self._settle(delivery, Disposition.RELEASE)
        else:
            self._settle(delivery, Disposition.ACK)

    def _surely(self, publish: Callable[[], None]) -> None:
        """Publish until the broker confirms it; `PublishFailed` only once the worker is stopping."""
        tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PublishFailed),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            stop=tenacity.stop_when_event_set(self._is_draining),
            sleep=tenacity.sleep_using_event(self._is_draining),
            reraise=True,
        )(publish)

    def _work(self, run: Run) -> None:
        with bind(task_id=run.task_id, generation_id=run.generation_id):
            self._note_arrival(run)
            try:
                ending = self._end(run)
            except TaskIdTaken as error:
                self._begin_anew(run, error)
                return
            except PublishFailed as error:
                # Nothing is safe elsewhere, so the broker keeps it; the ledger stops a second effect.
                ending = _Ending(Disposition.RELEASE, "released", code=str(error))
            deliveries = self.runs.leave(run)
            if run.lease_ends_at:
                self._leases.give_up(run)
            for delivery in deliveries:
                self._part_from(delivery, ending.disposition)
            self._note_departure(run, ending)

    def _begin_anew(self, run: Run, why: TaskIdTaken) -> None:
        """Begin a run's job again under an id of its own. On lease it has no delivery; its copy comes back for it."""
        deliveries = self.runs.leave(run)
        if run.lease_ends_at:
            self._leases.give_up(run)
        for delivery in deliveries:
            self._begin_under_own_id(run.asked, delivery, why)

    def _part_from(self, delivery: Delivery, disposition: Disposition) -> None:
        if disposition is Disposition.RELEASE and delivery.queue == self._names.recover:
            # Given back it would be counted, and the job given up after so many deployments.
            self._copy_to(self._names.recover, replace(delivery, is_leased=False))
        else:
            self._settle(delivery, disposition)

    def _holds(self, delivery: Delivery) -> bool:
        assert self._consumer is not None, "deliveries come from a consumer"  # noqa: S101
        return self._consumer.holds(delivery)

    def _end(self, run: Run) -> _Ending:
        try:
            event = self._storyteller.tell(run)
        except TaskIdTaken:
            raise
        except RecordUnreadable as error:
            # It may have been reported before: neither drawing nor reporting anything can be right.
            return self._leave_to_a_person(run, f"the record of the job's end cannot be read: {error}")
        except Exception as error:  # noqa: BLE001 - the job thread's boundary: whatever it was, the job must be settled
            return self._end_badly(run, judge(error, run.attempt), error)
        return self._tell(run, event, Disposition.ACK)

    def _leave_to_a_person(self, run: Run, reason: str) -> _Ending:
        """Keep the message with the dead letters and report nothing."""
        self._surely(lambda: self._notifier.dead_letter(run.first.body, reason, attempt=run.attempt))
        return _Ending(Disposition.DEAD_LETTER, "undecodable", message=reason)

    def _end_badly(self, run: Run, verdict: Verdict, error: Exception) -> _Ending:
        if verdict.code not in ("", CANCELLED):
            log_event(logger, "job broke off", logging.WARNING, code=verdict.code, reason=str(error))
        if verdict.code == "INTERNAL_ERROR":
            logger.exception("unforeseen error", exc_info=error)

        match verdict.disposition:
            case Disposition.RELEASE:
                return _Ending(Disposition.RELEASE, "released")
            case Disposition.RETRY:
                return self._retry_later(run, verdict)
            case _:
                return self._fail(run, verdict)

    def _retry_later(self, run: Run, verdict: Verdict) -> _Ending:
        queue, body = self._names.retry(verdict.delay_seconds), run.first.body
        self._surely(lambda: self._publisher.publish(queue, body, attempt=run.attempt + 1, reason=verdict.message))
        return _Ending(Disposition.RETRY, "retried", verdict.code, message=verdict.message)

    def _fail(self, run: Run, verdict: Verdict) -> _Ending:
        event = failed_event(
            task_id=run.task_id,
            generation_id=run.generation_id,
            code=verdict.code,
            message=verdict.message,
            retry_count=run.attempt - 1,
            worker=self._storyteller.worker,
            began_at=run.began_at,
            stages=run.timeline(),
            ended_at=run.now,
            fingerprint=run.fingerprint,
        )
        unrecorded = ""
        try:
            with run.stage("record"):
                event = self._gate.insist(lambda: self._ledger.record(event))
            check_same(run.asked, run.first.body, event.generation_id, event.fingerprint)
        except JobReleased:
            return _Ending(Disposition.RELEASE, "released")
        except RecordUnreadable as error:
            return self._leave_to_a_person(run, f"the record of the job's end cannot be read: {error}")
        except StorageError as error:
            if verdict.disposition is Disposition.ACK:
                return self._end_badly(run, judge(error, run.attempt), error)
            # The budget of tries is spent on this very store. Sent without a record, the failure could be followed by
            # another end of the same task.
            unrecorded = str(error)
        if verdict.disposition is Disposition.DEAD_LETTER:
            body = run.first.body
            self._surely(
                lambda: self._notifier.dead_letter(body, f"{verdict.code}: {verdict.message}", attempt=run.attempt)
            )
        return self._tell(run, event, verdict.disposition, unrecorded)

    def _tell(self, run: Run, event: TerminalEvent, disposition: Disposition, unrecorded: str = "") -> _Ending:
        """Send the event, or have the outbox do it. `unrecorded` says why the store has no record of it."""
        with run.stage("notify"):
            told = ""

            def tell() -> None:
                nonlocal told
                told = self._notifier.park_unrecorded(event, unrecorded) if unrecorded else self._notifier.notify(event)

            self._surely(tell)
        code, message = (str(event.body.get(name, "")) for name in ("error_code", "error_message"))
        return _Ending(disposition, event.outcome, code, told, message)

    def _settle(self, delivery: Delivery, disposition: Disposition) -> None:
        assert self._consumer is not None, "deliveries come from a consumer"  # noqa: S101
        self._quarantine.leave(delivery)
        if disposition is Disposition.RELEASE:
            self._consumer.requeue(delivery)
        else:
            self._consumer.ack(delivery)

    def _note_arrival(self, run: Run) -> None:
        waited = _seconds_since_creation(run.asked)
        if waited is not None:
            self._metrics.queue_wait_seconds.observe(waited)
        first = run.first
        log_event(logger, "job in", attempt=run.attempt, queue=first.queue, num_deliveries=first.num_deliveries)
        if isinstance(run.asked, Job) and run.asked.ignored:
            self._metrics.ignored_fields.inc(len(run.asked.ignored))
            log_event(logger, "fields ignored", logging.WARNING, names=", ".join(run.asked.ignored))

    def _note_departure(self, run: Run, ending: _Ending) -> None:
        seconds: dict[str, float] = {}
        for name, _, took in run.timeline():
            seconds[name] = round(seconds.get(name, 0.0) + took, 4)
        for name, took in seconds.items():
            self._metrics.stage_seconds.labels(name).observe(took)
        total = run.seconds
        self._metrics.jobs.labels(ending.outcome).inc()
        self._metrics.job_seconds.observe(total)
        self._history.add(run, ending.outcome, code=ending.code, message=ending.message)
        log_event(
            logger,
            "job out",
            outcome=ending.outcome,
            code=ending.code,
            webhook=ending.webhook,
            disposition=ending.disposition.name,
            attempt=run.attempt,
            seconds=total,
            stages=seconds,
        )


def _seconds_since_creation(asked: Job | JobRejected) -> float | None:
    # A time without a zone may be hours off, which a histogram and its alerts would take for waiting.
    if isinstance(asked, JobRejected) or asked.created_at is None or asked.created_at.tzinfo is None:
        return None
    return max(0.0, (datetime.now(UTC) - asked.created_at).total_seconds())
