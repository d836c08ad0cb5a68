"""Poll the gauges that need I/O: cache size, outbox, GPU, queue depths."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping

from clients.gpu import GpuMonitor
from clients.storage.cache import DownloadCache
from config.logs import log_event
from worker.amqp.publisher import Publisher, PublishFailed
from worker.last_hour import LastHour
from worker.metrics import Metrics
from worker.results.outbox import Outbox

logger = logging.getLogger(__name__)

GAUGE_SECONDS = 5.0


class GaugePoller:
    """Owner of the polling thread, apart from the main thread, which handles signals.

    It ends when `is_draining` is set. Queue depths are polled only while `is_connected` returns True.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        cache: DownloadCache,
        outbox: Outbox,
        publisher: Publisher,
        gpu: GpuMonitor,
        last_hour: LastHour,
        job_queues: Collection[str],
        is_connected: Callable[[], bool],
        is_draining: threading.Event,
    ) -> None:
        self._metrics = metrics
        self._cache = cache
        self._outbox = outbox
        self._publisher = publisher
        self._gpu = gpu
        self._last_hour = last_hour
        self._job_queues = job_queues
        self._is_connected = is_connected
        self._is_draining = is_draining
        self._shown: set[str] = set()  # queues

    def start(self) -> None:
        threading.Thread(target=self._run, name="gauges", daemon=True).start()

    def _run(self) -> None:
        while not self._is_draining.wait(GAUGE_SECONDS):
            self._metrics.adapter_cache_bytes.set(self._cache.size_bytes)
            backlog = self._outbox.backlog()
            self._metrics.outbox_events.set(backlog.num_events)
            self._metrics.outbox_age_seconds.set(backlog.age_seconds)
            if (usage := self._gpu.read()) is not None:
                self._metrics.gpu_memory_bytes.labels("used").set(usage.memory_used_bytes)
                self._metrics.gpu_memory_bytes.labels("total").set(usage.memory_total_bytes)
                self._metrics.gpu_utilization_ratio.set(usage.utilization_ratio or 0.0)
            try:
                # The consumer's login attempts are enough: brokers count those with a wrong password.
                depths = self._publisher.depths() if self._is_connected() else {}
            except PublishFailed as error:
                log_event(logger, "queue depths unknown", logging.DEBUG, reason=str(error))
            else:
                if depths:
                    self._show(depths)

    def _show(self, depths: Mapping[str, int]) -> None:
        for name, depth in depths.items():
            self._metrics.queue_messages.labels(name).set(depth)
        # Of a queue that cannot be used the last depth would be shown for ever.
        for name in self._shown - depths.keys():
            self._metrics.queue_messages.remove(name)
        self._shown = set(depths)
        self._last_hour.note_waiting(sum(depths.get(name, 0) for name in self._job_queues))
