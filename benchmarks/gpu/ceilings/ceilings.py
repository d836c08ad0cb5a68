"""Stage 0: what this machine can do at most, by torch alone, so that what the engine does can be held against it."""

import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import attention_kernels, bank_kernels
from benchmarks.gpu.clocks import raise_clocks, time_calls
from benchmarks.gpu.stage import Context

MATMUL_SIDE = 8192
COPY_BYTES = 2 << 30
# SDXL r64 on all linear layers is a pinned buffer of this size.
PINNED_BYTES = 335_000_000
NUM_LAUNCHES = 2000
PROBE_SECONDS = 25.0
NVIDIA_SMI = (
    "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,compute_mode,mig.mode.current"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(context: Context) -> None:
    """Measure every ceiling, those first that the other stages are held against."""
    context.measure("machine", lambda: _machine(context))
    raise_clocks(context)
    for name, dtype in DTYPES.items():
        context.measure(f"matmul {name}", partial(_matmul, context, dtype))
    context.measure("copy on the device", lambda: _copy(context))
    context.measure("launches", lambda: _launches(context))
    context.measure("host to device", lambda: _transfers(context), needs_cuda=True)
    bank_kernels.measure(context)
    attention_kernels.measure(context)
    context.measure("expandable segments", _expandable_segments, needs_cuda=True)


def _machine(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if not context.is_cuda:
        return found
    properties = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "free_bytes": free,
        "total_bytes": total,
        "nvidia_smi": _nvidia_smi(),
    }


def _matmul(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    side = MATMUL_SIDE if context.is_cuda else 256
    one, other = (torch.randn(side, side, device=context.device).to(dtype) for _ in range(2))
    times = time_calls(context, lambda: torch.mm(one, other), repeats=100, seconds=1.0)
    return {"side": side, **times._asdict(), "tflops": 2 * side**3 / times.steady_ms / 1e9}


def _copy(context: Context) -> dict[str, Any]:
    num_bytes = COPY_BYTES if context.is_cuda else 1 << 20
    source = torch.ones(num_bytes, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    times = time_calls(context, lambda: target.copy_(source), repeats=20, seconds=1.0)
    return {"bytes": num_bytes, **times._asdict(), "tb_per_second": 2 * num_bytes / times.steady_ms / 1e9}


def _launches(context: Context) -> dict[str, Any]:
    """Time launches of the smallest kernel back to back: the host's share of each, and the device's."""
    number = torch.zeros(8, device=context.device)

    def launch_all() -> None:
        for _ in range(NUM_LAUNCHES):
            number.add_(1)

    with torch.inference_mode():
        times = time_calls(context, launch_all, repeats=5)
    each = 1000 / NUM_LAUNCHES
    return {"host_us": times.host_ms * each, "device_us": times.device_ms * each, "launches": NUM_LAUNCHES}


def _transfers(context: Context) -> dict[str, Any]:
    """Measure GB/s from either kind of host memory, and how long pinning some takes."""
    there = torch.empty(PINNED_BYTES, dtype=torch.uint8, device=context.device)
    pageable = torch.ones(PINNED_BYTES, dtype=torch.uint8)
    started_at = time.perf_counter()
    pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    pin_seconds = time.perf_counter() - started_at
    pinned.copy_(pageable)
    figures = {"bytes": PINNED_BYTES, "pin_ms": pin_seconds * 1000}
    for name, host in (("pinned", pinned), ("pageable", pageable)):
        times = time_calls(context, partial(there.copy_, host, non_blocking=True), repeats=5)
        figures[f"{name}_gb_per_second"] = PINNED_BYTES / times.steady_ms / 1e6
        figures[f"{name}_host_ms"] = times.host_ms
    return figures


def _expandable_segments() -> dict[str, Any]:
    """Measure in a separate process: the allocator reads its settings once."""
    command = [sys.executable, "-m", "benchmarks.gpu.ceilings.expandable", str(os.getpid())]
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    output = done.stdout.strip() or done.stderr.strip()[-500:]
    return {"works": done.returncode == 0 and output == "True", "exit_code": done.returncode, "output": output}


def _nvidia_smi() -> dict[str, str] | str:
    command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(NVIDIA_SMI.split(","), values, strict=False))


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
