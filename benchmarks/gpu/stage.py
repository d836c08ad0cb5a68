"""What a stage is given: the device, its deadline, and where its figures go.

A stage is a module with `def run(context: Context) -> None`, listed in `benchmarks.gpu.stages`, run in a child process.
"""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Figures = Mapping[str, Any]


class DeviceLost(Exception):
    """The device fails at everything after an error (a sticky CUDA error): the rest would only repeat it."""


@dataclass(frozen=True)
class Context:
    """`size` is "full", or "tiny" for a rehearsal; `out` is the folder of the results, for files beside them.

    `deadline` (`time.monotonic()`) is when this process is killed. `record(name, **figures)` writes one line at once;
    a name serves once in a stage. A figure `error` counts as a failed measurement, `skipped` as one left out.
    """

    device: torch.device
    size: str
    out: Path
    deadline: float
    record: Callable[..., None]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(
        self, name: str, work: Callable[[], Figures], *, needs_cuda: bool = False, needs_seconds: float = 0.0
    ) -> bool:
        """Record what `work` returns under `name`, and how long it took; False where it did not come to that.

        An error becomes the line, and the stage goes on: one measurement is lost. `DeviceLost` where the device is.
        """
        if needs_cuda and not self.is_cuda:
            self.record(name, skipped="needs CUDA")
            return False
        if not self.is_tiny and self.seconds_left() < needs_seconds:
            reason = f"takes {needs_seconds:.0f} s, {self.seconds_left():.0f} s are left"
            self.record(name, skipped=reason)
            return False
        started_at = time.monotonic()
        try:
            figures = work()
        except Exception as error:  # noqa: BLE001 - the boundary of a measurement
            self.record(name, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-2000:])
            failure = error.with_traceback(None)
        else:
            self.record(name, **figures, measured_in_seconds=time.monotonic() - started_at)
            return True
        # Only here, outside the except block, is the traceback gone and with it the tensors it held.
        gc.collect()
        self._check_device(failure)
        return False

    def synchronize(self) -> None:
        """Wait for all that was launched on the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _check_device(self, failure: Exception) -> None:
        if not self.is_cuda:
            return
        try:
            torch.cuda.empty_cache()
            total = float(torch.ones(64, device=self.device).sum())
        except RuntimeError as error:
            raise DeviceLost(f"the device fails at everything since: {failure}") from error
        if total != 64.0:
            raise DeviceLost(f"the device miscounts since: {failure}")
