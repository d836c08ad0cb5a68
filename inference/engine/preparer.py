"""Prepare requests on background threads while others denoise: read adapters, load ControlNets."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from config.logs import log_event
from inference.errors import RequestFailed
from inference.lora.adapter import Adapter, check_rank
from inference.lora.adapter_key import AdapterKey, ReadAdapter
from inference.lora.bank import PackedAdapter
from inference.lora.errors import AdapterError
from inference.request import AdapterFile, Stage

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Preparer:
    """Owner of the preparing thread, which reads, checks and packs adapters, and of the loading thread."""

    def __init__(
        self,
        *,
        read: Callable[[Path, Path | None], Adapter],
        pack: Callable[[Adapter], PackedAdapter],
        max_rank: int,
        on_ready: Callable[[], None],
    ) -> None:
        """`read` raises `AdapterError`. `on_ready` is called on one of the threads when a future is done."""
        self._read_adapter = read
        self._pack = pack
        self._max_rank = max_rank
        self._on_ready = on_ready
        self._lock = threading.Lock()
        # Weak: a packed adapter is held in memory only by the requests that wait for it.
        self._readings: WeakValueDictionary[AdapterKey, Future[ReadAdapter]] = WeakValueDictionary()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preparer")
        self._loading_thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def submit(self, make: Callable[[], T]) -> Future[T]:
        """Run `make` on the preparing thread, which every request waits for."""
        return self._submit_to(self._thread, make)

    def load(self, make: Callable[[], T]) -> Future[T]:
        """Run `make`, which may take many seconds, on the loading thread."""
        return self._submit_to(self._loading_thread, make)

    def read(self, key: AdapterKey, file: AdapterFile) -> Future[ReadAdapter]:
        """Begin to read the adapter, or return the future of `key` that a waiting request still holds. Thread-safe.

        It resolves to the packed adapter or `RequestFailed`; one that ran out of memory is not shared.
        """
        with self._lock:
            reading = self._readings.get(key)
            if reading is None or ran_out_of_memory(reading):
                self._readings[key] = reading = self.submit(lambda: self._read(file))
            return reading

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._loading_thread.shutdown(wait=True, cancel_futures=True)

    def _submit_to(self, thread: ThreadPoolExecutor, make: Callable[[], T]) -> Future[T]:
        future = thread.submit(make)
        future.add_done_callback(lambda _: self._on_ready())
        return future

    def _read(self, file: AdapterFile) -> ReadAdapter:
        started_at = time.monotonic()
        try:
            adapter = self._read_adapter(file.weights, file.config)
            check_rank(adapter, self._max_rank)
            packed = self._pack(adapter)
        except AdapterError as error:
            raise RequestFailed(error.code, str(error)) from error
        seconds = time.monotonic() - started_at
        log_event(logger, "adapter read", file=file.weights.name, seconds=round(seconds, 3))
        return ReadAdapter(packed, Stage("adapt", started_at, seconds))


def ran_out_of_memory(future: Future[Any]) -> bool:
    """Return whether the future ended with an out-of-memory error of the device, which may not occur again."""
    return future.done() and not future.cancelled() and isinstance(future.exception(), torch.OutOfMemoryError)
