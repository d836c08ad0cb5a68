"""Loading an adapter into a full-size SD 1.5: diffusers against the engine's bank."""

import statistics
from pathlib import Path
from typing import Any

import safetensors.torch

from benchmarks.batching.bench import DTYPE, Bench, spread
from benchmarks.batching.forwards import load_model
from benchmarks.models import ATTENTION, build, write_adapter


def measure_swap(folder: Path, rounds: int) -> dict[str, Any]:
    """Time a rank-16 adapter into a full-size SD 1.5, from host memory to usable, by diffusers and by the engine."""
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
    model = load_model(bench)
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
    # The first of each allocates and warms caches.
    theirs, reading, ours, stalls = theirs[1:], reading[1:], ours[1:], stalls[1:]
    return {
        "case": "an adapter from host memory to usable",
        "model": "sd15",
        "seconds": {
            "diffusers load and unload": spread(theirs),
            "pack and write": spread(ours),
            "of that, while lanes wait": spread(stalls),
            "read and check the file": spread(reading),
        },
        "speedup": statistics.median(theirs) / statistics.median(ours),
    }
