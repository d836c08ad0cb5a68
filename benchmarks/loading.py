"""What loading a checkpoint takes of host memory, and how long: each case in a fresh process, on random weights.

`make bench`. A checkpoint of about a gigabyte in 32 or 16 bits is loaded as several dtypes, and then read through once,
as the first step would: weights that stay mapped from their files are not read before. There are two peaks: "own"
(anonymous) is what only this process has, over what the weights take in memory; "all" counts pages mapped from files
too, which the kernel takes back when memory is short, over what the weights take in memory or on disk, whichever is
more. Expected: own stays at the weights once, and near nothing where no dtype changes; the goal is at most 1.2. All
stays there too but where a whole file is converted at once: its pages and what is made of them are there together.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import models
from inference.checkpoints.checkpoint import identify
from inference.checkpoints.pipeline import load_pipeline, weight_bytes
from tests.support.models.ldm_layout import write_single_file

MB = 1e6
SAMPLE_SECONDS = 0.001
STATUS = Path("/proc/self/status")
# Written to clear_refs, this sets the peak (VmHWM) back to what the process has now.
RESET_PEAK = "5"

SIZES = {
    "short": models.Size(512, (32, 64, 128, 128), 256, 4, (32, 64, 64, 64)),
    "1gb": models.Size(512, (192, 384, 512, 512), 512, 8, (64, 128, 256, 256), vae_layers_per_block=2),
}
# dtype on disk, shape on disk, dtype in memory
CASES = (
    ("float32", "folder", "float32"),
    ("float32", "folder", "bfloat16"),
    ("float32", "shards", "bfloat16"),
    ("float32", "single file", "float32"),
    ("float32", "single file", "bfloat16"),
    ("float16", "folder", "float16"),
    ("float16", "folder", "bfloat16"),
    ("float16", "folder", "float32"),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Loading:
    """Memory in MB and seconds of one load, beyond the process's baseline."""

    disk_mb: float
    memory_mb: float
    peak_all_mb: float
    peak_own_mb: float
    load_seconds: float
    read_seconds: float

    @property
    def ratio_all(self) -> float:
        return self.peak_all_mb / max(self.disk_mb, self.memory_mb)

    @property
    def ratio_own(self) -> float:
        return self.peak_own_mb / self.memory_mb


class _Memory(NamedTuple):
    peak_bytes: int
    all_bytes: int
    own_bytes: int


def main() -> None:
    """Measure every case, print the table and, last, the line of JSON."""
    arguments = _arguments()
    if arguments.child is not None:
        print(json.dumps(asdict(measure_here(*arguments.child))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = build(Path(folder), arguments.size)
        for disk, shape, dtype in CASES:
            results[f"{disk} {shape} as {dtype}"] = measure(sources, disk, shape, dtype)
    _print_table(results)
    line = json.dumps(
        {
            "benchmark": "loading",
            "device": f"{platform.machine()} CPU, 1 thread, {os.cpu_count()} cores",
            "cases": {
                name: asdict(one) | {"ratio_all": one.ratio_all, "ratio_own": one.ratio_own}
                for name, one in results.items()
            },
        }
    )
    if arguments.out is not None:
        arguments.out.write_text(line + "\n")
    print(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1gb")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(folder: Path, size: str, cases: Sequence[tuple[str, str, str]] = CASES) -> Path:
    """Write the checkpoint as the cases need it, and a tiny one to warm up on; returns `folder`."""
    models.build("tiny", folder / "tiny", torch.float32)
    models.SIZES[size] = SIZES[size]
    for disk in {disk for disk, _, _ in cases}:
        whole = models.build(size, folder / f"{disk} folder", DTYPES[disk])
        shapes = {shape for other, shape, _ in cases if other == disk}
        if shapes != {"folder"}:
            pipe = load_pipeline(identify(str(whole), None), DTYPES[disk])
            pipe.save_pretrained(folder / f"{disk} shards", max_shard_size="200MB")
            write_single_file(folder / f"{disk} single file.safetensors", pipe)
    return folder


def measure(sources: Path, disk: str, shape: str, dtype: str) -> Loading:
    """Load one of `build`'s checkpoints in a process of its own."""
    source = sources / (f"{disk} {shape}.safetensors" if shape == "single file" else f"{disk} {shape}")
    child = [sys.executable, "-m", "benchmarks.loading", "--child", str(source), str(sources / f"{disk} folder"), dtype]
    ended = subprocess.run(
        [*child, str(sources / "tiny")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Loading(**json.loads(ended.stdout.splitlines()[-1]))


def measure_here(source: str, config: str, dtype_name: str, tiny: str) -> Loading:
    """Load in this process, after importing and warming the libraries."""
    dtype = DTYPES[dtype_name]
    _read(load_pipeline(identify(tiny, None), dtype))

    checkpoint = identify(source, config)
    weights = weight_bytes(checkpoint, dtype.itemsize)
    assert weights is not None
    path = Path(source)
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    gc.collect()
    # Freed memory that the process still has would be taken again, and a copy in it not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    before = _memory()
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    with _own_peak() as own_peak:
        started_at = time.perf_counter()
        pipeline = load_pipeline(checkpoint, dtype)
        loaded_at = time.perf_counter()
        _read(pipeline)
        ended_at = time.perf_counter()
    return Loading(
        disk_mb=sum(file.stat().st_size for file in files) / MB,
        memory_mb=sum(weights.values()) / MB,
        peak_all_mb=(_memory().peak_bytes - before.all_bytes) / MB,
        peak_own_mb=(max(own_peak) - before.own_bytes) / MB,
        load_seconds=loaded_at - started_at,
        read_seconds=ended_at - loaded_at,
    )


def _read(pipeline: Any) -> None:
    """Touch every weight."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            for parameter in model.parameters():
                parameter.detach().sum()


@contextmanager
def _own_peak() -> Iterator[list[int]]:
    """Sample the peak of anonymous memory every millisecond: the kernel keeps no such peak."""
    seen = [_memory().own_bytes]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_SECONDS):
            seen[0] = max(seen[0], _memory().own_bytes)

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    is_over.set()
    thread.join()
    seen.append(_memory().own_bytes)


def _memory() -> _Memory:
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE))
    return _Memory(*(int(lines[name]) * 1024 for name in ("VmHWM", "VmRSS", "RssAnon")))


def _print_table(results: dict[str, Loading]) -> None:
    table = Table("on disk, as", "disk MB", "memory MB", "peak own", "ratio", "peak all", "ratio", "load s", "read s")
    for name, one in results.items():
        own = (f"{one.peak_own_mb:.0f}", f"{one.ratio_own:.2f}")
        everything = (f"{one.peak_all_mb:.0f}", f"{one.ratio_all:.2f}")
        seconds = (f"{one.load_seconds:.1f}", f"{one.read_seconds:.1f}")
        table.add_row(name, f"{one.disk_mb:.0f}", f"{one.memory_mb:.0f}", *own, *everything, *seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
