"""GPU readings, also where there is no GPU."""

import pytest

from clients.gpu import GpuMonitor


@pytest.mark.parametrize("hidden", ["", "-1", " -1,0", "GPU-no-such-device"])
def test_gpu_that_is_hidden_or_missing_has_no_metrics(hidden: str) -> None:
    readings = GpuMonitor(hidden)

    assert readings.read() is None
    assert readings.read() is None
    assert readings.describe() == ""


def test_gpu_metrics_are_complete_or_absent() -> None:
    reading = GpuMonitor().read()

    if reading is None:
        pytest.skip("no NVIDIA driver here")
    assert "driver" in GpuMonitor().describe()
    assert 0 < reading.memory_used_bytes <= reading.memory_total_bytes
    assert reading.utilization_ratio is None or 0 <= reading.utilization_ratio <= 1
