"""What fits where: the weights on the device for good, one model at a time, or not at all.

Free of torch at import: `darkroom check` foretells with the same words what the engine will do.
"""

import logging
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.logs import log_event
from inference.request import EngineStartFailed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GB = 1e9
# What a picture of base size takes beside the weights: a guided forward, and the decoder in tiles. Pictures beyond the
# first are the batcher's business, which measures what they take.
RESERVE_BYTES = 2_000_000_000

MEMINFO = Path("/proc/meminfo")
# Limit, use and the file of statistics with what of the use is file pages that can go, of cgroups 2 and 1.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Residence(Enum):
    """Where the models live while the engine runs."""

    RESIDENT = "resident"  # all on the device, from the start
    OFFLOADED = "offloaded"  # in host memory, and on the device one at a time


def decide(needed: Mapping[str, int], free: int) -> Residence:
    """How models of `needed` bytes run with `free` bytes on the device; EngineStartFailed where not even one fits."""
    if sum(needed.values()) + RESERVE_BYTES <= free:
        return Residence.RESIDENT
    largest = max(needed, key=lambda name: needed[name])
    if needed[largest] + RESERVE_BYTES <= free:
        return Residence.OFFLOADED
    raise EngineStartFailed(
        f"the model does not fit the GPU: its {largest} takes {needed[largest] / GB:.1f} GB and a picture"
        f" {RESERVE_BYTES / GB:.1f} GB, {free / GB:.1f} GB are free: end what else runs there, set DTYPE to a 16-bit"
        " type, name a smaller MODEL_ID or use a larger GPU"
    )


def foresee(device_type: str, needed: Mapping[str, int], free: int) -> Residence:
    """Decide, before the weights are read, and say loudly what is not as one would want it."""
    figures = {"needed_gb": round(sum(needed.values()) / GB, 2), "free_gb": round(free / GB, 2)}
    if device_type == "cpu":
        if sum(needed.values()) > free:
            advice = "the machine will swap or kill the worker: free memory, or name a smaller MODEL_ID"
            log_event(logger, "the model is larger than the free memory", logging.WARNING, **figures, advice=advice)
        return Residence.RESIDENT

    residence = decide(needed, free)
    if residence is Residence.OFFLOADED:
        advice = "models take turns on the GPU, every picture is slower: end what else runs there or use a larger GPU"
        figures["reserve_gb"] = RESERVE_BYTES / GB
        log_event(logger, "the model does not fit the GPU as a whole", logging.WARNING, **figures, advice=advice)
    return residence


def place(pipeline: Any, device: "torch.device", residence: Residence) -> None:
    """Bring the pipeline where it is to live. Once offloaded, it must not be moved by anything else."""
    if residence is Residence.RESIDENT:
        pipeline.to(device)
        return
    from inference.checkpoints.offload import take_turns  # noqa: PLC0415 - brings torch, which the supervisor never imports

    take_turns(pipeline, device)


def free_bytes(device: "torch.device") -> int:
    """Bytes that are free on the device now; of a CPU, host memory within the container's limit."""
    if device.type == "cpu":
        return free_host_bytes()
    import torch  # noqa: PLC0415

    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def free_host_bytes() -> int:
    """Bytes of host memory to be had without swapping, within the container's limit."""
    available = _number(MEMINFO, "MemAvailable:") * 1024
    return min([available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterable[int]:
    for folder, limit, used, reclaimable in CGROUPS:
        try:
            # cgroup 2 writes "max" where there is no limit.
            limit_bytes = int(Path(folder, limit).read_text())
            used_bytes = int(Path(folder, used).read_text())
            yield max(0, limit_bytes - used_bytes + _number(Path(folder, "memory.stat"), reclaimable))
        except (OSError, ValueError, StopIteration):
            continue


def _number(path: Path, name: str) -> int:
    """The number behind `name` in a file of such lines."""
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
