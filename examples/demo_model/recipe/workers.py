"""The threads that a training step's micro-batches are computed by."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

# Two threads of one core each, not two threads in each operation: beside another busy process OpenMP's threads wait
# for one another in every operation, these only once a step.
CPU_WORKERS = 2

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Owner of the threads. A GPU has one, and takes a step's batch in one piece."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num = CPU_WORKERS if device.type == "cpu" else 1
        self.precision = torch.bfloat16 if _has_bfloat16(device) else torch.float32
        self._pool = ThreadPoolExecutor(self.num, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return the results in the order of `items`, whichever worker computed them."""
        return list(self._pool.map(function, items))

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        self.map(lambda job: job(), jobs)

    def autocast(self) -> AbstractContextManager[object]:
        """Use half precision where the device is quick in it. Without the cache, which threads would share."""
        enabled = self.precision is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def close(self) -> None:
        self._pool.shutdown()


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to CUDA where there is a GPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
