"""What a batched forward costs: the loop's overhead, adapters per row, and the arithmetic reached."""

import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.batching.bench import DEVICE, DTYPE, NUM_JOBS, Bench, Engine, seconds_each, spread
from benchmarks.sets import Job
from config.model import ModelSettings
from inference.lane import ActiveRequest, Conditioning, Lane
from inference.lora.products.rows import AppliedAdapter
from inference.models.base import Family
from inference.models.inputs import Prompt
from inference.models.loader import load_family
from inference.request import EngineLoad

MATMUL_SIDE = 1024


def measure_overhead(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Measure the share of full-batch steps' time spent outside the UNet, without joining and decoding."""
    unet, loop = engine.local.default.family._pipeline.unet, engine.local.default.loop
    plain_forward, plain_step = unet.forward, loop.step
    inside: list[float] = []
    steady: list[tuple[float, float]] = []
    num_lanes_before = 0

    def timed(*args: Any, **kwargs: Any) -> Any:
        started_at = bench.clock()
        try:
            return plain_forward(*args, **kwargs)
        finally:
            inside.append(bench.clock() - started_at)

    def step() -> EngineLoad:
        nonlocal num_lanes_before
        inside.clear()
        started_at = bench.clock()
        engine_load = plain_step()
        seconds = bench.clock() - started_at
        if num_lanes_before == engine_load.num_batched == engine_load.num_lanes == NUM_JOBS:
            steady.append((sum(inside), seconds))
        num_lanes_before = engine_load.num_lanes
        return engine_load

    unet.forward, loop.step = timed, step  # type: ignore[method-assign]
    try:
        for _ in range(bench.rounds):
            engine.draw_all(bench.jobs)
    finally:
        unet.forward, loop.step = plain_forward, plain_step  # type: ignore[method-assign]
    shares = [1 - forward / turn for forward, turn in steady]
    return {"steps": len(steady), "share_beside_denoiser": statistics.median(shares)}


def measure_adapters(bench: Bench) -> dict[str, Any]:
    """Time a forward of ten lanes with ten adapters, and with one of them, against the same lanes without."""
    model = load_model(bench)
    rows = _load_bank(bench, model)
    with torch.inference_mode():
        lanes = [_lane(bench, model, job) for job in bench.jobs]

        def forward(num_styled: int) -> float:
            for number, (lane, row) in enumerate(zip(lanes, rows, strict=True)):
                lane.owner.row = row if number < num_styled else ()
            # The first forward of other rows finds out what they have: a batch's rows stay the same for many steps.
            model.denoise(lanes)
            started_at = bench.clock()
            model.denoise(lanes)
            return bench.clock() - started_at

        seconds: dict[int, list[float]] = {len(rows): [], 1: [], 0: []}
        for _ in range(3 * bench.rounds):
            for num_styled, own in seconds.items():
                own.append(forward(num_styled))
    styled, one, plain = seconds.values()
    return {
        "seconds": {"with": spread(styled), "one": spread(one), "without": spread(plain)},
        "ratio": statistics.median(styled) / statistics.median(plain),
        "ratio_of_one": statistics.median(one) / statistics.median(plain),
        "bank_mb": model.bank.num_bytes / 1e6,
    }


def load_model(bench: Bench) -> Family:
    """Load the bench's model on the CPU."""
    settings = ModelSettings.model_validate({"MODEL_ID": str(bench.folder)})
    return load_family(settings, device=DEVICE, dtype=DTYPE)


def _load_bank(bench: Bench, model: Family) -> list[tuple[AppliedAdapter, ...]]:
    """Write all adapters into the bank; return the adapters of each job's row."""
    places: dict[Path, tuple[int, ...]] = {}
    page = 1
    for path in dict.fromkeys(path for job in bench.jobs for path, _ in job.adapters):
        packed = model.pack(model.read_adapter(path, None))
        places[path] = tuple(range(page, page + packed.num_pages))
        page += packed.num_pages
        model.bank.write(places[path], packed)
    return [tuple(AppliedAdapter(places[path], scale) for path, scale in job.adapters) for job in bench.jobs]


def _lane(bench: Bench, model: Family, job: Job) -> Lane:
    request = bench.request(job)
    active = ActiveRequest(request, model.batch_traits(request), lambda _: None, lambda: False, ())
    active.conditioning = Conditioning(*model.encode([Prompt(job.prompt), Prompt("", is_left_out=True)], [(), ()]))
    lane = active.lanes[0]
    _, lane.sampler = model.begin(lane)
    return lane


def measure_utilization(bench: Bench) -> float:
    """Return the denoiser's FLOP/s in a batch of ten over those of a large matrix product on this device."""
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE)
    peak = 2 * MATMUL_SIDE**3 / seconds_each(bench, lambda: a @ a)
    model = load_model(bench)
    with torch.inference_mode():
        lanes = [_lane(bench, model, job) for job in bench.jobs]
        with FlopCounterMode(display=False) as counter:
            model.denoise(lanes)
        return counter.get_total_flops() / seconds_each(bench, lambda: model.denoise(lanes)) / peak
