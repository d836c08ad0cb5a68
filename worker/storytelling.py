"""The storyteller of a worker whose model is loaded, put together of the worker's own parts."""

from threading import Event

from clients.storage.cache import DownloadCache
from clients.storage.client import Storage
from config.settings import Settings
from inference.request import Engine, ModelFacts
from worker.breakers import StoreGate
from worker.jobs.cancellations import Cancellations
from worker.jobs.engine_client import EngineClient
from worker.jobs.handler import JobHandler
from worker.jobs.inputs.fetcher import Fetcher
from worker.jobs.inputs.places import Places
from worker.product.cutter import Cutter
from worker.product.generation import ProductGeneration
from worker.progress.reporter import ProgressReporter
from worker.results.image_metadata import ImageEncoder
from worker.results.image_store import ImageStore
from worker.results.ledger import Ledger


def storyteller_of(
    settings: Settings,
    facts: ModelFacts,
    *,
    worker: str,
    engine: Engine,
    storage: Storage,
    cache: DownloadCache,
    ledger: Ledger,
    progress: ProgressReporter,
    labeller: ImageEncoder,
    cancellations: Cancellations,
    gate: StoreGate,
    is_draining: Event,
) -> JobHandler:
    """One for all jobs; `worker` is its name in the records."""
    fetcher = Fetcher(
        storage=storage,
        cache=cache,
        private_bucket=settings.store.bucket,
        font_dirs=settings.service.font_dirs,
        facts=facts,
        is_draining=is_draining,
        gate=gate,
        results_bucket=settings.store.results_bucket,
        places=Places(settings.model.max_concurrent_generations // 2),
    )
    drawer = EngineClient(engine, is_draining)
    store = ImageStore(storage, gate, ledger.find)
    cutter = Cutter(settings.pictures.cutout_model)
    return JobHandler(
        ledger=ledger,
        fetcher=fetcher,
        drawer=drawer,
        products=ProductGeneration(fetcher, drawer, store, cutter, settings.store.bucket),
        store=store,
        facts=facts,
        progress=progress,
        labeller=labeller,
        results_bucket=settings.store.results_bucket,
        worker=worker,
        cancellations=cancellations,
        gate=gate,
    )
