"""Step-level batching: many jobs with many adapters by plain diffusers and by the engine, side by side.

`make bench`, on a CPU; GPUs have `benchmarks.gpu`. Both sides run in one process, a round of each in turn, seeded;
medians of the rounds. One thread and process time, since wall time would include a neighbour on the other core.

Expected: one batch of ten costs far less than ten batches of one while one picture does not fill the device, and the
engine loads an adapter with one copy where diffusers wraps every layer; ten different adapters cost a batch a few
per cent, which is their arithmetic and, on small models, the calls that do it.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.batching.adapter_swap import measure_swap
from benchmarks.batching.arrivals import measure_joining, measure_poisson
from benchmarks.batching.bench import NUM_JOBS, Bench, Engine, encode_all, make_bench, spread
from benchmarks.batching.diffusers_side import draw_by_diffusers, measure_preloaded
from benchmarks.batching.forwards import measure_adapters, measure_overhead, measure_utilization
from benchmarks.batching.mixed import measure_mixed, tables
from benchmarks.models import SIZES
from benchmarks.sets import psnr_db


def main() -> None:
    """Run every requested case; print the tables and, last, a line of JSON."""
    arguments = _parse_arguments()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            print(f"{name} …", flush=True)
            results.append(
                _measure(make_bench(name, Path(folder) / name, steps=arguments.steps, rounds=arguments.rounds))
            )
        if arguments.swap:
            results.append(measure_swap(Path(folder) / "swap", arguments.rounds))
        if arguments.mixed:
            bench = make_bench("demo", Path(folder) / "mixed", steps=arguments.steps, rounds=arguments.rounds)
            results.append(measure_mixed(bench))
    _print_tables(results)
    line = json.dumps({"benchmark": "batching", "device": _device_name(), "jobs": NUM_JOBS, "results": results})
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.batching", description=__doc__)
    parser.add_argument("--models", nargs="*", default=["tiny", "demo", "35m"], choices=("demo", *SIZES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--swap", action="store_true", help="also load adapters into a full-size SD 1.5")
    parser.add_argument("--mixed", action="store_true", help="also a load of four sizes, by the demo model")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    return parser.parse_args()


def _measure(bench: Bench) -> dict[str, Any]:
    with Engine(bench) as engine:
        pipe = bench.pipeline()
        sides = {
            "diffusers": lambda: draw_by_diffusers(bench, pipe),
            "engine": lambda: encode_all(engine.draw_all(bench.jobs)),
        }
        images = {name: side() for name, side in sides.items()}  # warm-up, and the images to compare
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
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "speedup": statistics.median(seconds["diffusers"]) / statistics.median(seconds["engine"]),
            "mean_batch": statistics.mean(batched),
            "min_psnr_db": min(map(psnr_db, images["diffusers"], images["engine"])),
            "preloaded": measure_preloaded(bench, statistics.median(seconds["engine"])),
            "joining": measure_joining(bench, engine),
            "overhead": measure_overhead(bench, engine),
            "poisson": measure_poisson(bench, engine, statistics.median(seconds["engine"])),
        }
    return result | {"adapters_cost": measure_adapters(bench), "utilization": measure_utilization(bench)}


def _device_name() -> str:
    return f"{platform.machine()} CPU, 1 thread, {os.cpu_count()} cores"


def _print_tables(results: list[dict[str, Any]]) -> None:
    for result in results:
        if "loads" in result:
            Console(width=110).print(*tables(result))
            continue
        table = Table("seconds", "median", "min", "max", title=f"{result['model']}: {result['case']}")
        for name, seconds in result["seconds"].items():
            table.add_row(name, *(f"{seconds[key]:.4f}" for key in ("median", "min", "max")))
        Console().print(table)
        print({key: value for key, value in result.items() if key not in ("seconds", "case", "model")}, flush=True)


if __name__ == "__main__":
    main()
