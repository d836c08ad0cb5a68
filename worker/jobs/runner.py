"""The run of a job on its thread: call the handler, record and report the end, settle the deliveries."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from clients.storage.errors import StorageError
from config.logs import bind, log_event
from worker.amqp.delivery import Delivery
from worker.amqp.publisher import Publisher, PublishFailed
from worker.amqp.topology import QueueNames
from worker.breakers import StoreGate
from worker.errors import ErrorCode, JobReleased
from worker.jobs.disposition import Decision, Disposition, decide
from worker.jobs.handler import JobHandler
from worker.jobs.history import History
from worker.jobs.leases import Leases
from worker.jobs.runs import Phase, Run, Runs
from worker.jobs.settler import Settler
from worker.messages.identity import TaskIdTaken, check_same
from worker.messages.job import Job
from worker.metrics import Metrics
from worker.outcome import Outcome
from worker.results.ledger import Ledger, RecordUnreadable
from worker.results.notifier import Notifier
from worker.results.terminal_event import TerminalEvent, failed_event
from worker.tracing.tracing import AttemptEnd, JobAttempt, Tracing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended and how its deliveries are settled. `code` and `message` say why the job failed, `webhook`
    what the notifier did, `result_urls` what the status page may link to. The code of a recorded end may be unknown to
    `ErrorCode`: another version wrote it."""

    disposition: Disposition
    outcome: Outcome
    code: str = ""
    webhook: str = ""
    message: str = ""
    result_urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobRunner:
    """Runs jobs, each on the thread that calls `run`; one for all jobs."""

    handler: JobHandler
    runs: Runs
    settler: Settler
    ledger: Ledger
    notifier: Notifier
    publisher: Publisher
    names: QueueNames
    metrics: Metrics
    gate: StoreGate
    leases: Leases
    history: History
    tracing: Tracing

    def run(self, run: Run, restart: Callable[[Delivery, TaskIdTaken], None]) -> None:
        """Run the job and settle its deliveries; blocks. Where the task id turns out to be another generation's,
        `restart` gets each delivery instead; a run on lease has none, its copy comes back for it."""
        span = self.tracing.begin(_attempt_at(run))
        run.trace = span.trace
        with bind(task_id=run.task_id, generation_id=run.generation_id, **span.log_fields):
            self._log_start(run)
            try:
                outcome = self._do(run)
            except TaskIdTaken as error:
                span.end(AttemptEnd(run.timeline(), Outcome.RELEASED))
                for delivery in self._finish(run):
                    restart(delivery, error)
                return
            except PublishFailed as error:
                # No copy is confirmed, so the broker keeps the message; the ledger prevents a second effect.
                log_event(logger, "job broke off", logging.WARNING, code="", reason=str(error))
                outcome = RunOutcome(Disposition.RELEASE, Outcome.RELEASED)
            with span.settling():
                for delivery in self._finish(run):
                    self.settler.settle_uncounted(delivery, outcome.disposition)
            num_steps = run.progress.step_index if run.progress else 0
            span.end(AttemptEnd(run.timeline(), outcome.outcome, outcome.code, num_steps))
            self._log_end(run, outcome)

    def _finish(self, run: Run) -> list[Delivery]:
        """Remove the run from the registry, give up its lease, and return its deliveries, which are not settled."""
        deliveries = self.runs.finish(run)
        if run.lease_ends_at:
            self.leases.give_up(run)
        return deliveries

    def _do(self, run: Run) -> RunOutcome:
        try:
            event = self.handler.handle(run)
        except TaskIdTaken:
            raise
        except RecordUnreadable as error:
            return self._dead_letter_unreadable(run, error)
        except Exception as error:  # noqa: BLE001 - the job thread's boundary: whatever it was, the job must be settled
            return self._end_by(run, decide(error, run.attempt), error)
        return self._notify(run, event, Disposition.ACK)

    def _dead_letter_unreadable(self, run: Run, error: RecordUnreadable) -> RunOutcome:
        """Leave the job to a person: its end may have been reported, so neither a new image nor a failure is right."""
        reason = f"the record of the job's end cannot be read: {error}"
        self._dead_letter(run, reason)
        return RunOutcome(Disposition.DEAD_LETTER, Outcome.UNDECODABLE, message=reason)

    def _end_by(self, run: Run, decision: Decision, error: Exception) -> RunOutcome:
        """Release, retry or fail the job, as was decided about `error`."""
        if decision.code not in (None, ErrorCode.CANCELLED):
            log_event(logger, "job broke off", logging.WARNING, code=decision.code, reason=str(error))
        if decision.code is ErrorCode.INTERNAL_ERROR:
            logger.exception("unforeseen error", exc_info=error)

        match decision.disposition:
            case Disposition.RELEASE:
                return RunOutcome(Disposition.RELEASE, Outcome.RELEASED)
            case Disposition.RETRY:
                body, origin = run.first.body, run.origin
                queue = self.names.retry(decision.delay_seconds, origin.queue)
                self.settler.publish_until_confirmed(
                    lambda: self.publisher.publish(
                        queue, body, attempt=run.attempt + 1, reason=decision.message, origin=origin
                    )
                )
                return RunOutcome(Disposition.RETRY, Outcome.RETRIED, decision.code or "", message=decision.message)
            case _:
                return self._fail(run, decision)

    def _fail(self, run: Run, decision: Decision) -> RunOutcome:
        event = self._failed_event(run, decision)
        unrecorded = ""
        try:
            with run.stage(Phase.RECORD):
                event = self.gate.retry_while_denied(lambda: self.ledger.record(event))
            check_same(run.decoded, run.first.body, event.generation_id, event.fingerprint)
        except JobReleased:
            return RunOutcome(Disposition.RELEASE, Outcome.RELEASED)
        except RecordUnreadable as error:
            return self._dead_letter_unreadable(run, error)
        except StorageError as error:
            if decision.disposition is Disposition.ACK:
                return self._end_by(run, decide(error, run.attempt), error)
            # The attempts were used up on this very store. Sent without a record, the failure could be followed by
            # another end of the same task.
            unrecorded = str(error)
        if decision.disposition is Disposition.DEAD_LETTER:
            self._dead_letter(run, f"{decision.code}: {decision.message}")
        return self._notify(run, event, decision.disposition, unrecorded)

    def _failed_event(self, run: Run, decision: Decision) -> TerminalEvent:
        assert decision.code is not None, "only a released job has no code"  # noqa: S101
        return failed_event(
            task_id=run.task_id,
            generation_id=run.generation_id,
            code=decision.code,
            message=decision.message,
            retry_count=run.attempt - 1,
            worker=self.handler.worker,
            began_at=run.started_unix,
            stages=run.timeline(),
            ended_at=run.now,
            fingerprint=run.fingerprint,
            trace=run.trace,
        )

    def _dead_letter(self, run: Run, reason: str) -> None:
        self.settler.publish_until_confirmed(
            lambda: self.notifier.dead_letter(run.first.body, reason, attempt=run.attempt, origin=run.origin)
        )

    def _notify(self, run: Run, event: TerminalEvent, disposition: Disposition, unrecorded: str = "") -> RunOutcome:
        """Send the event or park it in the outbox. `unrecorded` is the reason why the store has no record of it."""
        with run.stage(Phase.NOTIFY):
            webhook = ""

            def notify() -> None:
                nonlocal webhook
                if unrecorded:
                    webhook = self.notifier.park_unrecorded(event, unrecorded)
                else:
                    webhook = self.notifier.notify(event)

            self.settler.publish_until_confirmed(notify)
        code, message = (str(event.body.get(name, "")) for name in ("error_code", "error_message"))
        urls = self.notifier.urls.addresses_of(event) if self.history.shows_prompts else ()
        return RunOutcome(disposition, event.outcome, code, webhook, message, urls)

    def _log_start(self, run: Run) -> None:
        job, first = run.decoded, run.first
        if run.waited_seconds is not None:
            self.metrics.queue_wait_seconds.observe(run.waited_seconds)
        log_event(logger, "job in", attempt=run.attempt, queue=first.queue, num_deliveries=first.num_deliveries)
        if isinstance(job, Job) and job.ignored:
            self.metrics.ignored_fields.inc(len(job.ignored))
            log_event(logger, "fields ignored", logging.WARNING, names=", ".join(job.ignored))

    def _log_end(self, run: Run, outcome: RunOutcome) -> None:
        seconds: dict[str, float] = {}
        for name, _, took in run.timeline():
            seconds[name] = round(seconds.get(name, 0.0) + took, 4)
        for name, took in seconds.items():
            self.metrics.stage_seconds.labels(name).observe(took)
        total = run.seconds
        self.metrics.count_job(outcome.outcome, outcome.code)
        self.metrics.job_seconds.observe(total)
        self.history.add(
            run, outcome.outcome, code=outcome.code, message=outcome.message, result_urls=outcome.result_urls
        )
        log_event(
            logger,
            "job out",
            outcome=outcome.outcome,
            code=outcome.code,
            webhook=outcome.webhook,
            disposition=outcome.disposition.name,
            attempt=run.attempt,
            seconds=total,
            stages=seconds,
        )


def _attempt_at(run: Run) -> JobAttempt:
    return JobAttempt(
        queue=run.first.queue,
        task_id=run.task_id,
        generation_id=run.generation_id,
        number=run.attempt,
        message_bytes=len(run.first.body),
        trace=run.first.origin.trace,
        began_at=run.started_unix,
        now=lambda: run.now,
    )
