"""Memory and utilization of the GPU, from NVML."""

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml


@dataclass(frozen=True)
class GpuUsage:
    """Memory and utilization at one moment. `utilization_ratio` is 0 to 1, None without one (MIG slices)."""

    memory_used_bytes: int
    memory_total_bytes: int
    utilization_ratio: float | None


class GpuMonitor:
    """Owner of the NVML handle of the first visible GPU; thread-safe. NVML is initialized once, by the first `read`.

    An index is counted in PCI order, as NVML counts: CUDA agrees where `CUDA_DEVICE_ORDER=PCI_BUS_ID`, which the
    engine's process has.
    """

    def __init__(self, cuda_visible_devices: str | None = None) -> None:
        first = "0" if cuda_visible_devices is None else cuda_visible_devices.split(",")[0].strip()
        # An index or a UUID; None where every GPU is hidden.
        self._device = None if first in ("", "-1") else first
        self._lock = threading.Lock()
        self._is_opened = False
        self._handle: Any = None

    def read(self) -> GpuUsage | None:
        """Return the current usage; None without a driver, a visible GPU or an answer."""
        try:
            handle = self._open()
            if handle is None:
                return None
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError:
            return None
        utilization_ratio = None
        with suppress(pynvml.NVMLError):
            utilization_ratio = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        return GpuUsage(int(memory.used), int(memory.total), utilization_ratio)

    def describe(self) -> str:
        """Return the GPU's model and its driver's version; empty where `read` returns None."""
        try:
            handle = self._open()
            if handle is None:
                return ""
            return f"{pynvml.nvmlDeviceGetName(handle)}, driver {pynvml.nvmlSystemGetDriverVersion()}"
        except pynvml.NVMLError:
            return ""

    def _open(self) -> Any:
        with self._lock:
            if not self._is_opened:
                self._is_opened = True
                if self._device is not None:
                    pynvml.nvmlInit()
                    self._handle = _find_handle(self._device)
            return self._handle


def _find_handle(device: str) -> Any:
    if device.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device))
    if device.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(device)
    # CUDA accepts a prefix of a UUID; NVML does not.
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        if pynvml.nvmlDeviceGetUUID(handle).startswith(device):
            return handle
    return None
