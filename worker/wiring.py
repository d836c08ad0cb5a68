"""Wiring: every part of a worker is built here, once, and connected to the others. Nothing is started."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

from clients.gpu import GpuMonitor
from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from config.settings import Settings
from inference.process.engine_process import EngineProcess
from inference.request import ModelFacts
from worker.amqp.consumer import Consumer
from worker.amqp.publisher import Publisher
from worker.amqp.subscriptions import Broadcast, Subscription, WeightedSubscription
from worker.amqp.topology import QueueNames
from worker.breakers import STORE_THRESHOLD, Breaker, StoreGate, backend_breakers
from worker.jobs.cancellations import Cancellations
from worker.jobs.dispatcher import Dispatcher
from worker.jobs.engine_client import EngineClient
from worker.jobs.generation import generations
from worker.jobs.handler import JobHandler
from worker.jobs.history import History
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.slow_fetches import SlowFetchLimit
from worker.jobs.inputs.store_source import StoreSource
from worker.jobs.leases import LeaseKeeper, Leases
from worker.jobs.recovery import SuspectIsolation
from worker.jobs.runner import JobRunner
from worker.jobs.runs import Runs
from worker.jobs.settler import Settler
from worker.messages.decoder import rules_from
from worker.metrics import Metrics
from worker.monitoring.gauges import GaugePoller
from worker.monitoring.http_server import HealthServer
from worker.monitoring.idle import IdleTimer
from worker.monitoring.readiness import Readiness
from worker.monitoring.status_builder import StatusBuilder
from worker.product.cutter import Cutter
from worker.product.generation import ProductGenerator
from worker.progress.previews import Previewer
from worker.progress.reporter import ProgressReporter
from worker.results.image_metadata import ImageEncoder
from worker.results.image_store import ImageStore
from worker.results.ledger import Ledger
from worker.results.notifier import Notifier
from worker.results.outbox import PREFETCH as OUTBOX_PREFETCH
from worker.results.outbox import Outbox
from worker.results.outbox_snapshots import SnapshotStore, SnapshotWriter
from worker.results.result_urls import ResultUrls
from worker.tracing.switch import open_tracing, read_variables
from worker.version import darkroom_version

# Deliveries beyond the jobs that can be denoised, so that their adapters are fetched while others denoise.
EXTRA_PREFETCH = 2
# Redelivered jobs run beside the fresh ones, as many as can be denoised. One of them may kill this process: those that
# several workers were killed with run one at a time, see `worker.jobs.recovery`.
MIN_RECOVER_PREFETCH = 2


class Parts:
    """The parts of one worker. `is_stopping` is True from the first signal on."""

    def __init__(self, settings: Settings, is_stopping: Callable[[], bool]) -> None:
        self.settings = settings
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.is_draining = threading.Event()
        self.rules = rules_from(settings.model, settings.store, settings.images)
        self.metrics = Metrics()
        self.metrics.set_build(model=settings.model.model_id)
        self.tracing = open_tracing(read_variables(), worker=self.name)
        self.runs = Runs()
        self.cancellations = Cancellations()
        self.encoder = ImageEncoder(settings.images)
        self.engine = EngineProcess(
            settings.model,
            log_level=settings.service.log_level,
            log_format=settings.service.log_format,
            on_restart=self.metrics.engine_restarts.inc,
            on_load_report=self.metrics.note_engine_load,
        )
        self.storage = Storage(settings.store)
        self.cache = DownloadCache(self.storage, settings.store.cache_dir, settings.store.cache_max_bytes)
        self.ledger = Ledger(self.storage, settings.store.bucket)
        self.store_breaker = Breaker("the store", STORE_THRESHOLD)
        self.gate = StoreGate(self.store_breaker, self.is_draining)
        self._build_deliveries(settings)
        self.previewer = Previewer(self.storage, settings.store.results_bucket)
        self.progress = ProgressReporter(
            self.webhooks, self.previewer, settings.backend.progress_milestones, self.metrics, self.ledger.find
        )
        self._build_monitoring(settings, is_stopping)

    def _build_deliveries(self, settings: Settings) -> None:
        """Build what acks a delivery, and what keeps messages and ends safe before that."""
        self.names = QueueNames.of(settings.broker)
        self.publisher = Publisher(settings.broker, self.names)
        self.leases = Leases(
            self.storage, settings.store.bucket, self.publisher, self.names, settings.broker.consumer_timeout_seconds
        )
        self.webhooks = self.tracing.webhook_client(settings.backend)
        self.backend_breakers = backend_breakers(settings.backend)
        self.notifier = Notifier(
            client=self.webhooks,
            urls=ResultUrls(self.storage, settings.store.results_bucket),
            ledger=self.ledger,
            publisher=self.publisher,
            names=self.names,
            metrics=self.metrics,
            breakers=self.backend_breakers,
            is_draining=self.is_draining,
        )
        self.outbox = Outbox(self.notifier, self.ledger, self.publisher, self.names)
        self.isolation = SuspectIsolation()
        self.settler = Settler(self.publisher, self.notifier, self.names, self.isolation, self.is_draining)
        self.lease_keeper = LeaseKeeper(self.leases, self.runs, self.settler, self.ledger)

    def _build_monitoring(self, settings: Settings, is_stopping: Callable[[], bool]) -> None:
        """Build what shows the worker to others: readiness, metrics, the status page."""
        self.readiness = Readiness(
            self.engine,
            (self.store_breaker, *self.backend_breakers.values(), self.notifier.address_breaker),
            self.encoder,
            is_stopping=is_stopping,
        )
        self.metrics.ready.set_function(lambda: float(not self.readiness.why_not()))
        self.idle = IdleTimer(self.metrics)
        self.history = History(shows_prompts=settings.service.status_show_prompts)
        status = self._status_builder(settings)
        self.health = HealthServer(
            settings.service.metrics_port,
            self.metrics.registry,
            self.readiness.why_not,
            status.build,
            status.read_image,
        )
        self.gauges = GaugePoller(
            self.metrics,
            cache=self.cache,
            outbox=self.outbox,
            publisher=self.publisher,
            gpu=GpuMonitor(settings.model.visible_gpu),
            last_hour=self.history.last_hour,
            job_queues=self.names.job_queues,
            is_connected=lambda: self.readiness.is_connected,
            is_draining=self.is_draining,
        )
        snapshots = SnapshotStore(self.storage, settings.store.bucket)
        self.snapshots = SnapshotWriter(self.name, snapshots, self.outbox.held, self.is_draining)

    def _status_builder(self, settings: Settings) -> StatusBuilder:
        return StatusBuilder(
            name=self.name,
            version=darkroom_version(),
            began_at=time.time(),
            names=self.names,
            metrics=self.metrics,
            idle=self.idle,
            history=self.history,
            notifier=self.notifier,
            progress=self.progress,
            previewer=self.previewer,
            max_lanes=settings.model.max_concurrent_generations,
            max_cache_bytes=settings.store.cache_max_bytes,
            shows_prompts=settings.service.status_show_prompts,
            why_not_ready=self.readiness.why_not,
            facts=lambda: self.engine.facts,
            runs=self.runs.all,
        )

    @property
    def num_jobs(self) -> int:
        """Number of fresh deliveries held at once."""
        return self.settings.model.max_concurrent_generations + EXTRA_PREFETCH

    @property
    def num_recovered(self) -> int:
        """Number of redelivered ones held at once."""
        num_lanes = self.settings.model.max_concurrent_generations
        return max(num_lanes, MIN_RECOVER_PREFETCH)

    def dispatcher(self, facts: Mapping[str, ModelFacts], on_bug: Callable[[], None]) -> Dispatcher:
        """Build the dispatcher of a worker that has these models; `on_bug` is called when a job thread fails."""
        runner = JobRunner(
            handler=self._handler(facts),
            runs=self.runs,
            settler=self.settler,
            ledger=self.ledger,
            notifier=self.notifier,
            publisher=self.publisher,
            names=self.names,
            metrics=self.metrics,
            gate=self.gate,
            leases=self.leases,
            history=self.history,
            tracing=self.tracing,
        )
        return Dispatcher(
            rules=self.rules,
            runs=self.runs,
            runner=runner,
            settler=self.settler,
            isolation=self.isolation,
            names=self.names,
            metrics=self.metrics,
            # Of each queue one message more may be started when the worker stops, see `Intake`.
            num_threads=self.num_jobs + self.num_recovered + len(self.names.others),
            is_draining=self.is_draining,
            cancellations=self.cancellations,
            leases=self.leases,
            lease_keeper=self.lease_keeper,
            on_bug=on_bug,
        )

    def _handler(self, facts: Mapping[str, ModelFacts]) -> JobHandler:
        settings = self.settings
        source = StoreSource(
            storage=self.storage,
            cache=self.cache,
            private_bucket=settings.store.bucket,
            is_draining=self.is_draining,
            gate=self.gate,
            results_bucket=settings.store.results_bucket,
            places=SlowFetchLimit(settings.model.max_concurrent_generations // 2),
        )
        fetcher = Fetcher(source, settings.service.font_dirs, facts)
        engine_client = EngineClient(self.engine, self.is_draining)
        store = ImageStore(self.storage, self.gate, self.ledger.find, settings.store.result_cache_control)
        cutter = Cutter(settings.images.cutout_model)
        product = ProductGenerator(fetcher, facts, engine_client, store, cutter, settings.store.bucket)
        return JobHandler(
            ledger=self.ledger,
            fetcher=fetcher,
            generations=generations(engine_client, product.start),
            store=store,
            facts=facts,
            progress=self.progress,
            encoder=self.encoder,
            results_bucket=settings.store.results_bucket,
            worker=self.name,
            cancellations=self.cancellations,
            gate=self.gate,
            makes_thumbnails=settings.service.status_show_prompts,
        )

    def consumer(self, dispatcher: Dispatcher, *, not_before: float) -> Consumer:
        """Build the consumer of jobs, outbox and cancel orders, and connect it to what settles their deliveries."""
        queues = self.settings.broker.consumed
        subscriptions = [
            Subscription(self.names.recover, self.num_recovered, dispatcher.on_delivery),
            Subscription(self.names.outbox, OUTBOX_PREFETCH, self.outbox.on_delivery, is_work=False),
        ]
        weighted = None
        if len(queues) > 1:
            weighted = WeightedSubscription(queues, self.num_jobs, dispatcher.on_delivery)
        else:
            subscriptions.insert(0, Subscription(self.names.jobs, self.num_jobs, dispatcher.on_delivery))
        consumer = Consumer(
            self.settings.broker,
            self.names,
            subscriptions,
            Broadcast(self.names.cancel_exchange, dispatcher.on_cancel),
            weighted=weighted,
            on_lost=dispatcher.on_lost,
            not_before=not_before,
        )
        self.readiness.consumer = consumer
        self.settler.start(consumer)
        self.outbox.start(consumer)
        return consumer
