"""Plan the memory: whether the weights are resident on the device, or moved there one model at a time.

Free of torch at import: `darkroom check` plans with the same functions as the engine.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.logs import log_event
from inference.checkpoints.weight_files import GB
from inference.errors import EngineStartFailed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Memory of one image of base size beside the weights: a guided forward, and the decoder in tiles. The batcher measures
# what further images take.
RESERVE_BYTES = 2_000_000_000
# Share of the memory beside the weights for the pages of adapters, where ADAPTER_MEMORY_GB is unset.
ADAPTER_SHARE = 0.25

MEMINFO = Path("/proc/meminfo")
# Files of the limit and the use, and the statistic of reclaimable file pages, of cgroups 2 and 1.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Placement(Enum):
    """Where the models are while the engine runs."""

    RESIDENT = "resident"  # all on the device, from the start
    OFFLOADED = "offloaded"  # in host memory, and on the device one at a time


def plan(needed: Mapping[str, int], free: int, adapter_bytes: int | None = None) -> Placement:
    """Choose the placement of models of `needed` bytes with `free` bytes on the device, EngineStartFailed if none fits.

    `adapter_bytes` of them are kept for adapters, where ADAPTER_MEMORY_GB is set.
    """
    reserve = RESERVE_BYTES + (adapter_bytes or 0)
    if sum(needed.values()) + reserve <= free:
        return Placement.RESIDENT
    largest = max(needed, key=lambda name: needed[name])
    if needed[largest] + reserve <= free:
        return Placement.OFFLOADED
    kept = f" and ADAPTER_MEMORY_GB {adapter_bytes / GB:.1f} GB" if adapter_bytes else ""
    lower = "lower ADAPTER_MEMORY_GB, " if adapter_bytes else ""
    raise EngineStartFailed(
        f"the model does not fit the GPU: its {largest} takes {needed[largest] / GB:.1f} GB and a picture"
        f" {RESERVE_BYTES / GB:.1f} GB{kept}, {free / GB:.1f} GB are free: {lower}end what else runs there, set"
        " DTYPE to a 16-bit type or WEIGHTS to nf4, name a smaller MODEL_ID or use a larger GPU"
    )


def most_adapter_bytes(chosen: int | None, needed: Mapping[str, int], free: int, placement: Placement) -> int:
    """Return the limit for the pages of adapters: ADAPTER_MEMORY_GB, or a share of what the weights leave free."""
    if chosen is not None:
        return chosen
    on_device = sum(needed.values()) if placement is Placement.RESIDENT else max(needed.values())
    return max(0, int(ADAPTER_SHARE * (free - on_device)))


def plan_and_warn(
    device_type: str, needed: Mapping[str, int], free: int, adapter_bytes: int | None = None
) -> Placement:
    """Choose the placement before the weights are read, and log a warning where the models do not fit whole."""
    kept = adapter_bytes or 0
    figures = {"needed_gb": round(sum(needed.values()) / GB, 2), "free_gb": round(free / GB, 2)}
    if kept:
        figures["adapters_gb"] = round(kept / GB, 2)
    if device_type == "cpu":
        if sum(needed.values()) + kept > free:
            advice = "the machine will swap or kill the worker: free memory, or name a smaller MODEL_ID"
            log_event(logger, "the model is larger than the free memory", logging.WARNING, **figures, advice=advice)
        return Placement.RESIDENT

    placement = plan(needed, free, adapter_bytes)
    if placement is Placement.OFFLOADED:
        advice = "models take turns on the GPU, every picture is slower: end what else runs there or use a larger GPU"
        if sum(needed.values()) + RESERVE_BYTES <= free:
            advice = "models take turns on the GPU, every picture is slower: lower ADAPTER_MEMORY_GB"
        figures["reserve_gb"] = RESERVE_BYTES / GB
        log_event(logger, "the model does not fit the GPU as a whole", logging.WARNING, **figures, advice=advice)
    return placement


def place(pipeline: Any, device: "torch.device", placement: Placement) -> None:
    """Move the pipeline to its placement. Once offloaded, it must not be moved by anything else."""
    if placement is Placement.RESIDENT:
        pipeline.to(device)
        return
    from inference.checkpoints.offload import offload_in_turns  # noqa: PLC0415 - brings torch, which the supervisor never imports

    offload_in_turns(pipeline, device)


def free_bytes(device: "torch.device") -> int:
    """Return the bytes that are free on the device now; for a CPU, host memory within the container's limit."""
    if device.type == "cpu":
        return free_host_bytes()
    import torch  # noqa: PLC0415

    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def free_host_bytes() -> int:
    """Return the bytes of host memory available without swapping, within the container's limit."""
    available = _number(MEMINFO, "MemAvailable:") * 1024
    for folder, limit, used, reclaimable in CGROUPS:
        # cgroup 2 writes "max" where there is no limit.
        with suppress(OSError, ValueError, StopIteration):
            limit_bytes = int(Path(folder, limit).read_text())
            used_bytes = int(Path(folder, used).read_text())
            left = limit_bytes - used_bytes + _number(Path(folder, "memory.stat"), reclaimable)
            available = min(available, max(0, left))
    return available


def _number(path: Path, name: str) -> int:
    """Return the number behind `name` in a file of lines of name and number."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
