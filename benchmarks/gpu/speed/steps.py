"""Steps of a batch: how long they take by rows, plain and with adapters, their share of the device, their kernels."""

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clocks import Times, time_calls
from benchmarks.gpu.models.bench_model import BenchModel
from benchmarks.gpu.models.flops import FLOPS_PER_ROW
from benchmarks.gpu.models.jobs import NUM_JOBS
from benchmarks.gpu.records import read_records
from benchmarks.gpu.speed.forwards import Forwards
from benchmarks.gpu.stage import Context, Figures
from inference.device.device import USABLE_SHARE, Device

# Lanes of a forward: 2, 4, 8 and 20 rows where a lane has two.
LANES = (1, 2, 4, 10)
NUM_KERNELS = 30
# Where stage 0 has not run.
MATMUL_SIDE = 8192


def measure_steps(context: Context, model: BenchModel, forwards: Forwards) -> dict[str, Times]:
    """Record every step of `LANES`; those that came to a figure, by name."""
    found: dict[str, Times] = {}

    def measure(num_lanes: int, kind: str, *, has_adapters: bool) -> None:
        name = f"step of {num_lanes} lanes {kind}"

        def work() -> Figures:
            found[name] = time_calls(context, lambda: forwards.step(num_lanes, has_adapters=has_adapters))
            return {"rows": num_lanes * model.rows_per_lane, **found[name]._asdict()}

        context.measure(name, work)

    for num_lanes in _lanes_of(model):
        measure(num_lanes, "plain", has_adapters=False)
        measure(num_lanes, "with adapters", has_adapters=True)
    context.measure("adapters' cost", lambda: _ratios(found))
    context.measure("utilisation", lambda: _utilisation(context, model, found))
    return found


def measure_memory(context: Context, forwards: Forwards) -> Figures:
    """Measure the peak bytes of a row, beside what the engine's own measurement lets the batcher do with the free
    memory.
    """
    device = Device(context.device)
    figures: dict[str, Any] = {}
    for num_lanes in (1, NUM_JOBS):
        shape, rows = num_lanes, num_lanes * forwards.model.rows_per_lane
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
        before = torch.cuda.memory_allocated(context.device)
        with device.measured(shape, rows):
            forwards.step(num_lanes, has_adapters=True)
        context.synchronize()
        peak = torch.cuda.max_memory_allocated(context.device) - before
        free, _ = torch.cuda.mem_get_info(context.device)
        free += torch.cuda.memory_reserved(context.device) - torch.cuda.memory_allocated(context.device)
        figures[f"{rows} rows"] = {
            "peak_bytes_per_row": peak / rows,
            "device_bytes_per_row": USABLE_SHARE * free / device.max_rows(shape),
            "max_rows": device.max_rows(shape),
        }
    return {**figures, "bank_bytes": forwards.family.bank.num_bytes}


def profile_step(context: Context, forwards: Forwards) -> Figures:
    """Record the kernels with the largest total time in one step with adapters."""
    forwards.step(NUM_JOBS, has_adapters=True)
    context.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.is_cuda else [])]
    with profile(activities=activities) as profiled:
        forwards.step(NUM_JOBS, has_adapters=True)
        context.synchronize()
    found = [(_own_us(event), event) for event in profiled.key_averages()]
    if context.is_cuda:
        # Kernels alone: an operator's sum is its kernels' once more.
        found = [(us, event) for us, event in found if event.device_type.name == "CUDA"]
    found.sort(key=lambda one: -one[0])
    kernels = [{"us": us, "count": event.count, "kernel": event.key[:100]} for us, event in found[:NUM_KERNELS]]
    return {"total_us": sum(us for us, _ in found), "launches": sum(event.count for _, event in found), "top": kernels}


def _lanes_of(model: BenchModel) -> tuple[int, ...]:
    """Return the numbers of lanes: two of a rehearsal; not two where a row takes seventy times another model's
    arithmetic.
    """
    if model.is_tiny:
        return LANES[0], LANES[-1]
    return LANES if model.rows_per_lane == 2 else tuple(lanes for lanes in LANES if lanes != 2)


def _own_us(event: Any) -> float:
    return float(max(event.self_device_time_total, 0) or event.self_cpu_time_total)


def _ratios(found: dict[str, Times]) -> Figures:
    """Return the steady time of a step with adapters over one without."""
    pairs = {
        str(lanes): (found[f"step of {lanes} lanes with adapters"], found[f"step of {lanes} lanes plain"])
        for lanes in LANES
        if {f"step of {lanes} lanes with adapters", f"step of {lanes} lanes plain"} <= found.keys()
    }
    return {"by_lanes": {lanes: styled.steady_ms / plain.steady_ms for lanes, (styled, plain) in pairs.items()}}


def _utilisation(context: Context, model: BenchModel, found: dict[str, Times]) -> Figures:
    """Return the base model's FLOP/s over those of a large matrix product, adapters excluded."""
    peak = _measured_tflops(context)
    if model.is_tiny:
        return {"skipped": "the arithmetic is known at full size alone", "ceiling_tflops": peak}
    shares = {}
    for name, times in found.items():
        lanes = int(name.split()[2])
        tflops = FLOPS_PER_ROW[model.name] * lanes * model.rows_per_lane / times.steady_ms / 1e9
        shares[name] = tflops / peak
    return {"ceiling_tflops": peak, "tflop_per_row": FLOPS_PER_ROW[model.name] / 1e12, "share": shares}


def _measured_tflops(context: Context) -> float:
    """Stage 0's figure, or one of our own where this stage runs alone."""
    known = [one["tflops"] for one in read_records(context.out) if one["name"] == "matmul bf16" and "tflops" in one]
    if known:
        return float(known[0])
    side = MATMUL_SIDE if context.is_cuda else 256
    one = torch.randn(side, side, device=context.device).to(torch.bfloat16)
    return 2 * side**3 / time_calls(context, lambda: torch.mm(one, one), seconds=0.5).steady_ms / 1e9
