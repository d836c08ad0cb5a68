"""The worker as a whole: builds its parts, keeps them going, and takes them down in order."""

import ctypes
import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from enum import IntEnum
from importlib.metadata import version
from types import FrameType

from clients.gpu import GpuReadings
from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from clients.webhooks import WebhookClient
from config.logs import log_event
from config.settings import Settings, doubtful_names
from inference.process.engine_process import EngineProcess, EngineState
from inference.request import ModelFacts
from worker.amqp.connection import ConnectionProbe, probe_connection
from worker.amqp.consumer import Broadcast, Consumer, Subscription
from worker.amqp.publisher import Publisher
from worker.amqp.topology import QueueNames
from worker.breakers import BACKEND_THRESHOLD, STORE_THRESHOLD, Breaker, StoreGate
from worker.jobs.cancellations import Cancellations
from worker.jobs.history import History
from worker.jobs.leases import Leases
from worker.jobs.processing import Processor
from worker.jobs.runs import Run
from worker.messages.decoder import rules_from
from worker.metrics import Metrics
from worker.monitoring.gauges import Gauges
from worker.monitoring.http_server import HealthServer
from worker.monitoring.idle import IdleTimer, idle_reason
from worker.monitoring.readiness import Readiness
from worker.monitoring.status_builder import StatusBuilder
from worker.progress.previews import Previewer
from worker.progress.reporter import ProgressReporter
from worker.results.image_metadata import ImageEncoder
from worker.results.ledger import Ledger
from worker.results.notifier import Notifier
from worker.results.outbox import PREFETCH as OUTBOX_PREFETCH
from worker.results.outbox import Outbox
from worker.results.outbox_snapshots import SnapshotStore, SnapshotWriter
from worker.storytelling import storyteller_of

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
# Taken beyond the jobs that can be drawn, so that their adapters are fetched while others denoise.
EXTRA_PREFETCH = 2
# Redelivered jobs flow beside the fresh ones, as many as can be drawn. One of them may kill this process: those that
# several workers were killed with are done one at a time, see `recovering.py`.
MIN_RECOVER_PREFETCH = 2
# The end of the grace period belongs to giving jobs back and closing connections.
GRACE_RESERVE_SECONDS = 5.0
MIN_STOP_SECONDS = 2.0
# glibc's mallopt(3): once a picture's memory was freed, glibc would take the next one's from heaps that it keeps.
M_MMAP_THRESHOLD = -3
LARGE_BLOCK_BYTES = 1 << 20


class ExitCode(IntEnum):
    """What the process ends with."""

    OK = 0
    SETTINGS = 2  # the settings are wrong: see the message
    BUG = 1  # a thread ended by an error nobody foresaw
    ENGINE = 3  # the model cannot be loaded, or the engine crashed too often
    FORCED = 130  # a second signal


class Supervisor:
    """Owner of every part. `run` blocks on the main thread, which alone hears signals."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._labeller = ImageEncoder(settings.pictures)
        self._metrics = Metrics()
        self._cancellations = Cancellations()
        self._is_draining = threading.Event()
        self._num_signals = 0
        self._has_bug = False
        self._probe = ConnectionProbe()
        self._names = QueueNames(settings.broker.queue, settings.broker.consumer_timeout_seconds)
        self._storage = Storage(settings.store)
        self._cache = DownloadCache(self._storage, settings.store.cache_dir, settings.store.cache_max_bytes)
        self._ledger = Ledger(self._storage, settings.store.bucket)
        self._client = WebhookClient(settings.backend)
        self._publisher = Publisher(settings.broker, self._names)
        self._backend_breaker = Breaker("the backend", BACKEND_THRESHOLD)
        self._store_breaker = Breaker("the store", STORE_THRESHOLD)
        self._gate = StoreGate(self._store_breaker, self._is_draining)
        self._build_deliveries(settings)
        self._previewer = Previewer(self._storage, settings.store.results_bucket)
        self._progress = ProgressReporter(
            self._client, self._previewer, settings.backend.progress_milestones, self._metrics, self._ledger.find
        )
        self._engine = EngineProcess(
            settings.model,
            log_level=settings.service.log_level,
            log_format=settings.service.log_format,
            on_restart=self._metrics.engine_restarts.inc,
            on_load_report=self._metrics.note_engine_load,
        )
        self._processor: Processor | None = None
        self._consumer: Consumer | None = None
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._rules = rules_from(settings.model, settings.store, settings.pictures)
        self._build_views(settings)

    def _build_deliveries(self, settings: Settings) -> None:
        """What keeps messages and ends safe elsewhere."""
        self._leases = Leases(
            self._storage,
            settings.store.bucket,
            self._publisher,
            self._names,
            settings.broker.consumer_timeout_seconds,
        )
        self._notifier = Notifier(
            client=self._client,
            ledger=self._ledger,
            publisher=self._publisher,
            names=self._names,
            metrics=self._metrics,
            breaker=self._backend_breaker,
            is_draining=self._is_draining,
        )
        self._outbox = Outbox(self._notifier, self._ledger, self._publisher, self._names)

    def _build_views(self, settings: Settings) -> None:
        """What others see of the worker: is it ready, its metrics, its page."""
        self._readiness = Readiness(
            self._engine,
            (self._store_breaker, self._backend_breaker, self._notifier.address_breaker),
            self._labeller,
            is_stopping=lambda: self._is_stopping,
        )
        self._metrics.ready.set_function(lambda: float(not self._readiness.why_not()))
        self._idle = IdleTimer(self._metrics)
        self._history = History(shows_prompts=settings.service.status_show_prompts)
        board = self._board()
        self._health = HealthServer(
            settings.service.metrics_port,
            self._metrics.registry,
            self._readiness.why_not,
            board.read,
            board.read_preview,
        )
        self._gauges = Gauges(
            self._metrics,
            cache=self._cache,
            outbox=self._outbox,
            publisher=self._publisher,
            gpu=GpuReadings(settings.model.visible_gpu),
            is_connected=lambda: self._readiness.is_connected,
            is_draining=self._is_draining,
        )
        notes = SnapshotStore(self._storage, settings.store.bucket)
        self._waiting = SnapshotWriter(self._name, notes, self._outbox.held, self._is_draining)

    def run(self) -> ExitCode:
        """Work until a signal or a fatal failure; the exit code says which."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.excepthook = self._on_thread_failure
        _give_large_blocks_back()
        self._health.start()
        log_event(logger, "status page", url=f"http://localhost:{self._health.port}/")
        log_event(logger, "starting", metrics_port=self._health.port, model=self._settings.model.model_id)
        for doubt in doubtful_names():
            log_event(logger, "setting not known", logging.WARNING, reason=doubt)
        # Told before the model is loaded, which takes minutes; the consumer tries again for ever.
        self._probe = probe_connection(self._settings.broker)
        if self._probe.reason:
            log_event(logger, "broker not usable", logging.WARNING, reason=self._probe.reason)
        log_event(logger, "loading", model=self._settings.model.model_id)
        self._engine.start()
        self._publisher.start()
        self._progress.start()
        self._previewer.start()
        self._gauges.start()
        self._waiting.start()

        code = self._watch()
        self._stop(code)
        return code

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # Nothing but a count here: a handler may interrupt the main thread while it holds any lock.
        self._num_signals += 1
        if self._num_signals > 1:
            self._abandon()

    def _on_thread_failure(self, failure: threading.ExceptHookArgs) -> None:
        """A worker short of a thread looks alive and is not: better to drain and be started anew."""
        if failure.exc_value is not None:
            logger.critical("a thread failed: %s", failure.thread and failure.thread.name, exc_info=failure.exc_value)
        self._note_bug()

    def _note_bug(self) -> None:
        self._has_bug = True

    def _watch(self) -> ExitCode:
        while not self._num_signals:
            if self._engine.state is EngineState.FAILED:
                return ExitCode.ENGINE
            if self._has_bug:
                return ExitCode.BUG
            if self._consumer is None and self._engine.facts is not None:
                self._begin_consuming(self._engine.facts)
            self._tick()
            time.sleep(TICK_SECONDS)
        return ExitCode.OK

    def _begin_consuming(self, facts: ModelFacts) -> None:
        """Only now: a worker that cannot load its model must leave the queue to those that can."""
        num_lanes = self._settings.model.max_concurrent_generations
        num_jobs, num_recovered = num_lanes + EXTRA_PREFETCH, max(num_lanes, MIN_RECOVER_PREFETCH)
        self._progress.learn(facts.step_seconds)
        self._processor = self._new_processor(facts, num_threads=num_jobs + num_recovered)
        subscriptions = [
            Subscription(self._names.jobs, num_jobs, self._processor.on_delivery),
            Subscription(self._names.recover, num_recovered, self._processor.on_delivery),
            Subscription(self._names.outbox, OUTBOX_PREFETCH, self._outbox.on_delivery, is_work=False),
        ]
        orders = Broadcast(self._names.cancel_exchange, self._processor.on_cancel)
        self._consumer = Consumer(
            self._settings.broker,
            self._names,
            subscriptions,
            orders,
            on_lost=self._processor.on_lost,
            not_before=self._probe.retry_at,
        )
        self._readiness.consumer = self._consumer
        self._processor.start(self._consumer)
        self._outbox.start(self._consumer)
        self._consumer.start()
        threading.Thread(target=self._renew_leases, args=(self._processor,), name="leases", daemon=True).start()

    def _new_processor(self, facts: ModelFacts, *, num_threads: int) -> Processor:
        return Processor(
            rules=self._rules,
            storyteller=storyteller_of(
                self._settings,
                facts,
                worker=self._name,
                engine=self._engine,
                storage=self._storage,
                cache=self._cache,
                ledger=self._ledger,
                progress=self._progress,
                labeller=self._labeller,
                cancellations=self._cancellations,
                gate=self._gate,
                is_draining=self._is_draining,
            ),
            ledger=self._ledger,
            notifier=self._notifier,
            publisher=self._publisher,
            names=self._names,
            metrics=self._metrics,
            num_threads=num_threads,
            is_draining=self._is_draining,
            cancellations=self._cancellations,
            gate=self._gate,
            leases=self._leases,
            history=self._history,
            on_bug=self._note_bug,
        )

    def _renew_leases(self, processor: Processor) -> None:
        while not self._is_draining.wait(self._leases.renew_every):
            processor.go_on_lease()

    def _board(self) -> StatusBuilder:
        return StatusBuilder(
            name=self._name,
            version=version("darkroom"),
            began_at=time.time(),
            names=self._names,
            metrics=self._metrics,
            idle=self._idle,
            history=self._history,
            notifier=self._notifier,
            progress=self._progress,
            previewer=self._previewer,
            max_lanes=self._settings.model.max_concurrent_generations,
            max_cache_bytes=self._settings.store.cache_max_bytes,
            shows_prompts=self._settings.service.status_show_prompts,
            why_not_ready=self._readiness.why_not,
            facts=lambda: self._engine.facts,
            runs=self._runs,
        )

    def _runs(self) -> list[Run]:
        return self._processor.runs.all() if self._processor else []

    @property
    def _is_stopping(self) -> bool:
        return bool(self._num_signals) or self._is_draining.is_set()

    def _tick(self) -> None:
        if self._consumer is not None:
            self._consumer.pause(is_paused=bool(self._readiness.refusal))
        reason = idle_reason(
            phases={run.phase for run in self._runs()},
            is_engine_ready=self._engine.state is EngineState.READY,
            is_broker_connected=self._readiness.is_connected,
            is_refused=bool(self._readiness.refusal),
        )
        self._idle.tick(reason)

    def _stop(self, code: ExitCode) -> None:
        """Take no more, let what is being drawn end within the grace period, give back the rest, close."""
        started_at = time.monotonic()
        self._end_by(started_at + self._settings.service.shutdown_grace_seconds, code)
        log_event(logger, "stopping", exit_code=int(code), num_runs=len(self._runs()))
        if self._consumer is not None:
            self._consumer.stop_consuming()
        self._is_draining.set()
        if self._processor is not None:
            self._drain(self._processor)
        self._engine.close()
        if self._processor is not None:
            self._processor.close()
        self._progress.close()
        self._previewer.close()
        if self._consumer is not None:
            self._outbox.close()
            self._consumer.close()
        self._publisher.close()
        self._health.close()
        log_event(logger, "stopped", seconds=round(time.monotonic() - started_at, 2))

    def _end_by(self, deadline: float, code: ExitCode) -> None:
        """A store or broker that hangs must not hold the process beyond its grace: what is unsettled goes back."""
        guard = threading.Timer(max(MIN_STOP_SECONDS, deadline - time.monotonic()), os._exit, (int(code),))
        guard.daemon = True
        guard.start()

    def _drain(self, processor: Processor) -> None:
        deadline = time.monotonic() + self._settings.service.shutdown_grace_seconds - GRACE_RESERVE_SECONDS
        while processor.runs.all() and time.monotonic() < deadline:
            processor.release_waiting()
            self._tick()
            time.sleep(TICK_SECONDS)

    def _abandon(self) -> None:
        """The second signal: end now. The broker gives back what was not settled."""
        if self._engine.pid is not None:
            os.kill(self._engine.pid, signal.SIGKILL)
        os._exit(ExitCode.FORCED)


def _give_large_blocks_back() -> None:
    """Have the memory of pictures go back to the system as soon as it is freed, where the C library is glibc."""
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
