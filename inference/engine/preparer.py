"""What a request needs before it may join, made ready on threads of their own while others denoise."""

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
from inference.lora.files import AdapterError
from inference.request import AdapterFile, Stage

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


class Preparer:
    """Owner of the preparing thread, on which adapters are read, checked and packed, and of the loading thread."""

    def __init__(
        self,
        *,
        read: Callable[[Path, Path | None], Adapter],
        pack: Callable[[Adapter], PackedAdapter],
        max_rank: int,
        on_ready: Callable[[], None],
    ) -> None:
        """`read` raises `AdapterError`. `on_ready` is called on one of the threads when something is ready."""
        self._read_adapter = read
        self._pack = pack
        self._max_rank = max_rank
        self._on_ready = on_ready
        self._sharing = threading.Lock()
        # Weak: a packed adapter is held in memory only by the requests that wait for it.
        self._readings: WeakValueDictionary[AdapterKey, Future[ReadAdapter]] = WeakValueDictionary()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preparer")
        self._loading_thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def submit(self, make: Callable[[], Made]) -> Future[Made]:
        """Have `make` called on the preparing thread, which every request waits for."""
        return self._submit_to(self._thread, make)

    def load(self, make: Callable[[], Made]) -> Future[Made]:
        """Have `make`, which may take many seconds, called on the loading thread."""
        return self._submit_to(self._loading_thread, make)

    def read(self, key: AdapterKey, file: AdapterFile) -> Future[ReadAdapter]:
        """Begin to read, or share the reading of `key` that a waiting request still holds. Thread-safe.

        The future ends with the packed adapter or `RequestFailed`; one that ran out of memory is shared no longer.
        """
        with self._sharing:
            reading = self._readings.get(key)
            if reading is None or ran_out_of_memory(reading):
                self._readings[key] = reading = self.submit(lambda: self._read(file))
            return reading

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._loading_thread.shutdown(wait=True, cancel_futures=True)

    def _submit_to(self, thread: ThreadPoolExecutor, make: Callable[[], Made]) -> Future[Made]:
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
    """Did it end for want of the device's memory, which may be there the next time?"""
    return future.done() and not future.cancelled() and isinstance(future.exception(), torch.OutOfMemoryError)
