"""What the step-level batch is worth: many jobs with many adapters by plain diffusers and by the engine, side by side.

`make bench`, on a CPU; GPUs have `benchmarks.gpu`. Both sides run in one process, a round of each in turn, seeded;
medians of the rounds. One thread and process time, since a neighbour on the other core would be measured with it.

Expected: one batch of ten costs far less than ten batches of one while one picture does not fill the device, and the
engine loads an adapter with one copy where diffusers wraps every layer; ten different adapters cost a batch a few
per cent, which is their arithmetic and, on small models, the calls that do it.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import ADAPTERS, ALL_LINEAR, ATTENTION, DEMO_MODEL, SIZES, AdapterKind, build, write_adapter
from benchmarks.sets import Job, activate, image_of, psnr_db
from config.model import ModelSettings
from inference.engine.local_engine import LocalEngine
from inference.lane import ActiveRequest, Conditioning, Lane
from inference.lora.bank import AppliedAdapter
from inference.models.base import Family, Prompt
from inference.models.loader import load_family
from inference.request import EngineLoad, GenerationRequest, GenerationResult, StepReport

NUM_JOBS = 10
GUIDANCE = 5.0
# On layers of real width the largest is larger.
LARGEST_RANK = {"sd15": 128}
JOIN_ARRIVALS = 20
JOIN_STEPS = 10
POISSON_JOBS = 40
POISSON_LOAD = 0.7
MATMUL_SIDE = 1024
DEVICE = torch.device("cpu")
DTYPE = torch.float32


@dataclass(slots=True)
class Bench:
    """One model, and the jobs to draw with it."""

    name: str
    folder: Path
    pixels: int
    steps: int
    rounds: int
    jobs: list[Job]

    def clock(self) -> float:
        return time.process_time()

    def settings(self) -> ModelSettings:
        return ModelSettings(
            MODEL_ID=str(self.folder),
            DEVICE=DEVICE.type,
            MAX_CONCURRENT_GENERATIONS=NUM_JOBS,
        )

    def request(self, job: Job, *, steps: int | None = None) -> GenerationRequest:
        return job.request(pixels=self.pixels, steps=steps or self.steps, guidance=GUIDANCE)

    def pipeline(self) -> Any:
        pipe = StableDiffusionPipeline.from_pretrained(self.folder, dtype=DTYPE, safety_checker=None)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
        pipe.set_progress_bar_config(disable=True)
        return pipe


def main() -> None:
    """Run every case that was asked for, print the tables and, last, the line of JSON."""
    arguments = _arguments()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            print(f"{name} …", flush=True)
            results.append(_measure(_bench(name, Path(folder) / name, arguments)))
        if arguments.swap:
            results.append(_swap(Path(folder) / "swap", arguments.rounds))
    _print_tables(results)
    line = json.dumps({"benchmark": "batching", "device": _device_name(), "jobs": NUM_JOBS, "results": results})
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["tiny", "demo", "35m"], choices=("demo", *SIZES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--swap", action="store_true", help="also load adapters into a full-size SD 1.5")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    return parser.parse_args()


def _bench(name: str, folder: Path, arguments: argparse.Namespace) -> Bench:
    folder.mkdir()
    checkpoint = DEMO_MODEL / "checkpoint" if name == "demo" else build(name, folder / "checkpoint", DTYPE)
    pixels = 128 if name == "demo" else SIZES[name].pixels
    bench = Bench(name, checkpoint, pixels, arguments.steps, arguments.rounds, [])
    pipe = bench.pipeline()
    files = [_write_adapter(folder / f"{i}.safetensors", pipe, kind, seed=i) for i, kind in enumerate(_adapters(name))]
    worn: list[tuple[tuple[Path, float], ...]] = [((file, 1.0),) for file in files]
    worn += [(), ((files[0], 0.5), (files[2], 0.8))]
    bench.jobs = [Job(f"a picture of thing {i}", 100 + i, adapters) for i, adapters in enumerate(worn)]
    return bench


def _adapters(name: str) -> list[AdapterKind]:
    largest = max(kind.rank for kind in ADAPTERS)
    return [kind._replace(rank=LARGEST_RANK.get(name, largest)) if kind.rank == largest else kind for kind in ADAPTERS]


def _write_adapter(path: Path, pipe: Any, kind: AdapterKind, *, seed: int) -> Path:
    targets = ALL_LINEAR if kind.is_all_linear else ATTENTION
    return write_adapter(path, pipe, rank=kind.rank, targets=targets, seed=seed, has_text=kind.has_text)


def _measure(bench: Bench) -> dict[str, Any]:
    with Engine(bench) as engine:
        pipe = bench.pipeline()
        sides = {
            "diffusers": lambda: _by_diffusers(bench, pipe),
            "engine": lambda: _encoded(engine.draw_all(bench.jobs)),
        }
        pictures = {name: side() for name, side in sides.items()}  # warm-up, and the proof that both draw the same
        engine.num_batched.clear()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(bench.rounds):
            for name, side in sides.items():
                started_at = bench.clock()
                side()
                seconds[name].append(bench.clock() - started_at)
        batched = [count for count in engine.num_batched if count]
        result = {
            "case": "ten jobs, ten adapters",
            "model": bench.name,
            "pixels": bench.pixels,
            "steps": bench.steps,
            "rounds": bench.rounds,
            "seconds": {name: _spread(values) for name, values in seconds.items()},
            "speedup": statistics.median(seconds["diffusers"]) / statistics.median(seconds["engine"]),
            "mean_batch": statistics.mean(batched),
            "min_psnr_db": min(map(psnr_db, pictures["diffusers"], pictures["engine"])),
            "preloaded": _preloaded(bench, statistics.median(seconds["engine"])),
            "joining": _joining(bench, engine),
            "overhead": _overhead(bench, engine),
            "poisson": _poisson(bench, engine, statistics.median(seconds["engine"])),
        }
    return result | {"adapters_cost": _adapters_cost(bench), "utilization": _utilization(bench)}


class Engine:
    """The engine under test, and how many lanes each of its forwards had."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.num_batched: list[int] = []
        self.local = LocalEngine(bench.settings(), self._note)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.local.close()

    def _note(self, engine_load: EngineLoad) -> None:
        self.num_batched.append(engine_load.num_batched)

    def submit(
        self, job: Job, on_step: Callable[[Any], None] = lambda _: None, *, steps: int | None = None
    ) -> Future[GenerationResult]:
        return self.local.generate(self._bench.request(job, steps=steps), on_step, lambda: False)

    def draw_all(self, jobs: Sequence[Job]) -> list[Image.Image]:
        return [image_of(future.result()) for future in [self.submit(job) for job in jobs]]


def _by_diffusers(bench: Bench, pipe: Any) -> list[Image.Image]:
    """What a diffusers user would write: load the adapters, draw, unload, one job after another."""
    images = []
    for job in bench.jobs:
        names = [f"adapter_{i}" for i in range(len(job.adapters))]
        for name, (path, _) in zip(names, job.adapters, strict=True):
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        if names:
            pipe.set_adapters(names, [scale for _, scale in job.adapters])
        images.append(_draw(bench, pipe, job))
        if names:
            pipe.unload_lora_weights()
    return _encoded(images)


def _preloaded(bench: Bench, engine_seconds: float) -> dict[str, Any]:
    """The other thing a diffusers user would write: all adapters loaded for good, `set_adapters` for each job."""
    pipe = bench.pipeline()
    names: dict[Path, str] = {}
    for path in dict.fromkeys(path for job in bench.jobs for path, _ in job.adapters):
        names[path] = f"adapter_{len(names)}"
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=names[path])

    def draw() -> None:
        for job in bench.jobs:
            activate(pipe, names, job)
            _encoded([_draw(bench, pipe, job)])

    draw()
    seconds = []
    for _ in range(bench.rounds):
        started_at = bench.clock()
        draw()
        seconds.append(bench.clock() - started_at)
    return {"seconds": _spread(seconds), "speedup": statistics.median(seconds) / engine_seconds}


def _draw(bench: Bench, pipe: Any, job: Job) -> Image.Image:
    side = bench.pixels // pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, side, side)
    # As the engine draws it, whatever diffusers does.
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
    picture: Image.Image = pipe(
        job.prompt,
        negative_prompt="",
        width=bench.pixels,
        height=bench.pixels,
        num_inference_steps=bench.steps,
        guidance_scale=GUIDANCE,
        latents=noise,
    ).images[0]
    return picture


def _joining(bench: Bench, engine: Engine) -> dict[str, Any]:
    """A set is running with a lane free: how long does a job that arrives within a step wait for its own first one,
    beside the reading and encoding that it needs in any case?"""
    arrivals = [_arrival(bench, engine, number) for number in range(JOIN_ARRIVALS)]
    waits = sorted(arrival.wait_steps for arrival in arrivals)
    return {
        "arrivals": len(waits),
        "median_steps": statistics.median(waits),
        "p99_steps": waits[math.ceil(0.99 * len(waits)) - 1],
        "median_preparation_seconds": statistics.median(arrival.preparation_seconds for arrival in arrivals),
        "step_seconds": statistics.median(arrival.step_seconds for arrival in arrivals),
    }


class Arrival(NamedTuple):
    """A job that came while others were drawn; `wait_steps` without its preparation."""

    wait_steps: float
    preparation_seconds: float
    step_seconds: float


def _arrival(bench: Bench, engine: Engine, number: int) -> Arrival:
    joiner = bench.jobs[number % NUM_JOBS]
    are_running = threading.Event()
    told: list[tuple[float, StepReport]] = []
    step_seconds: list[float] = []

    def watch(report: StepReport) -> None:
        step_seconds.append(report.seconds)
        if report.step_index == 3:
            are_running.set()

    futures = [engine.submit(job, watch, steps=JOIN_STEPS) for job in bench.jobs if job is not joiner]
    are_running.wait()
    step = statistics.median(step_seconds[-NUM_JOBS:])
    time.sleep(random.Random(number).random() * step)  # anywhere within a step
    asked_at = time.perf_counter()
    joined = engine.submit(joiner, lambda report: told.append((time.perf_counter(), report)), steps=3)
    for future in [*futures, joined]:
        future.result()
    seconds = {stage.name: stage.seconds for stage in joined.result().stages}
    preparation = seconds["adapt"] + seconds["encode"]
    return Arrival((told[0][0] - asked_at - preparation) / step, preparation, step)


def _overhead(bench: Bench, engine: Engine) -> dict[str, Any]:
    """The share of the steady steps' time that is not spent in the UNet; joining and decoding lie outside of them."""
    unet, loop = engine.local._model._pipeline.unet, engine.local._loop
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


def _adapters_cost(bench: Bench) -> dict[str, Any]:
    """One forward of ten lanes with ten adapters against the same lanes without."""
    model = _model(bench)
    rows = _rows(bench, model)
    with torch.inference_mode():
        lanes = [_lane(bench, model, job) for job in bench.jobs]

        def forward(*, is_styled: bool) -> float:
            for lane, row in zip(lanes, rows, strict=True):
                lane.owner.row = row if is_styled else ()
            started_at = bench.clock()
            model.denoise(lanes)
            return bench.clock() - started_at

        for is_styled in (True, False, True, False):
            forward(is_styled=is_styled)
        styled, plain = [], []
        for _ in range(3 * bench.rounds):
            styled.append(forward(is_styled=True))
            plain.append(forward(is_styled=False))
    return {
        "seconds": {"with": _spread(styled), "without": _spread(plain)},
        "ratio": statistics.median(styled) / statistics.median(plain),
        "bank_mb": model.bank.num_bytes / 1e6,
    }


def _model(bench: Bench) -> Family:
    settings = ModelSettings.model_validate({"MODEL_ID": str(bench.folder)})
    return load_family(settings, device=DEVICE, dtype=DTYPE)


def _rows(bench: Bench, model: Family) -> list[tuple[AppliedAdapter, ...]]:
    """All adapters in the bank, and what each job wears of them."""
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


def _utilization(bench: Bench) -> float:
    """FLOPs of the denoiser in a batch of ten over what a large matrix product reaches on this device."""
    a = torch.randn(MATMUL_SIDE, MATMUL_SIDE)
    peak = 2 * MATMUL_SIDE**3 / _seconds_each(bench, lambda: a @ a)
    model = _model(bench)
    with torch.inference_mode():
        lanes = [_lane(bench, model, job) for job in bench.jobs]
        with FlopCounterMode(display=False) as counter:
            model.denoise(lanes)
        return counter.get_total_flops() / _seconds_each(bench, lambda: model.denoise(lanes)) / peak


def _seconds_each(bench: Bench, work: Callable[[], object], *, repeats: int = 5) -> float:
    """Seconds of one of `repeats` calls, after one that does not count."""
    work()
    started_at = bench.clock()
    for _ in range(repeats):
        work()
    return (bench.clock() - started_at) / repeats


def _poisson(bench: Bench, engine: Engine, seconds_for_ten: float) -> dict[str, Any]:
    """Random arrivals at `POISSON_LOAD` of the throughput measured above: how even are the times to a picture?"""
    chance = random.Random(0)
    rate = POISSON_LOAD * NUM_JOBS / seconds_for_ten
    took: list[float] = []
    futures = []
    for number in range(POISSON_JOBS):
        time.sleep(chance.expovariate(rate))
        asked_at = time.perf_counter()
        future = engine.submit(bench.jobs[number % NUM_JOBS])
        future.add_done_callback(lambda _, asked_at=asked_at: took.append(time.perf_counter() - asked_at))
        futures.append(future)
    for future in futures:
        future.result()
    ordered = sorted(took)
    p50, p99 = statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]
    return {"jobs": POISSON_JOBS, "load": POISSON_LOAD, "p50": p50, "p99": p99, "p99_over_p50": p99 / p50}


def _swap(folder: Path, rounds: int) -> dict[str, Any]:
    """A rank-16 adapter into a full-size SD 1.5, from host memory to usable: diffusers' load and unload, and ours."""
    folder.mkdir()
    bench = Bench("sd15", build("sd15", folder / "checkpoint", DTYPE), 512, 1, rounds, [])
    pipe = bench.pipeline()
    path = write_adapter(folder / "a.safetensors", pipe, rank=16, targets=ATTENTION, seed=0)
    state = safetensors.torch.load_file(path)
    theirs: list[float] = []
    for _ in range(rounds + 1):
        started_at = bench.clock()
        pipe.load_lora_weights(dict(state), adapter_name="a")
        pipe.unload_lora_weights()
        theirs.append(bench.clock() - started_at)
    del pipe
    model = _model(bench)
    adapter = model.read_adapter(path, None)
    reading: list[float] = []
    ours: list[float] = []
    stalls: list[float] = []
    for number in range(rounds + 1):
        started_at = bench.clock()
        model.read_adapter(path, None)
        read_at = bench.clock()
        packed = model.pack(adapter)
        packed_at = bench.clock()
        first = 1 + number % 2 * packed.num_pages
        model.bank.write(tuple(range(first, first + packed.num_pages)), packed)
        done_at = bench.clock()
        reading.append(read_at - started_at)
        ours.append(done_at - read_at)
        stalls.append(done_at - packed_at)
    # The first of each makes room and warms caches.
    theirs, reading, ours, stalls = theirs[1:], reading[1:], ours[1:], stalls[1:]
    return {
        "case": "an adapter from host memory to usable",
        "model": "sd15",
        "seconds": {
            "diffusers load and unload": _spread(theirs),
            "pack and write": _spread(ours),
            "of that, while lanes wait": _spread(stalls),
            "read and check the file": _spread(reading),
        },
        "speedup": statistics.median(theirs) / statistics.median(ours),
    }


def _encoded(images: list[Image.Image]) -> list[Image.Image]:
    """PNG files of them all, as both sides would have to make."""
    for image in images:
        image.save(BytesIO(), format="PNG")
    return images


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _device_name() -> str:
    return f"{platform.machine()} CPU, 1 thread, {os.cpu_count()} cores"


def _print_tables(results: list[dict[str, Any]]) -> None:
    for result in results:
        table = Table("seconds", "median", "min", "max", title=f"{result['model']}: {result['case']}")
        for name, spread in result["seconds"].items():
            table.add_row(name, *(f"{spread[key]:.4f}" for key in ("median", "min", "max")))
        Console().print(table)
        print({key: value for key, value in result.items() if key not in ("seconds", "case", "model")}, flush=True)


if __name__ == "__main__":
    main()
