"""What loading a checkpoint takes of host memory, and how long: each case in a fresh process, on random weights.

`make bench`. A checkpoint of about a gigabyte in 32 or 16 bits is loaded as several dtypes, and then read through once,
as the first step would: weights that stay mapped from their files are not read before. A Z-Image of a gigabyte, nearly
all of it linear layers, is loaded in 16 bits and quantized as `WEIGHTS` says. There are two peaks: "own"
(anonymous) is what only this process has, over what the weights take in memory; "all" counts pages mapped from files
too, which the kernel takes back when memory is short, over what the weights take in memory or on disk, whichever is
more. Expected: own stays at the weights once, and near nothing where no dtype changes; the goal is at most 1.2. All
stays there too but where a whole file is converted or quantized: its pages and what is made of them are there together.
"rest" is what the process has behind that, which the kernel may have less of by the file's pages.
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
from diffusers import DiffusionPipeline, ZImageTransformer2DModel
from rich.console import Console
from rich.table import Table

from benchmarks import models
from inference.checkpoints.checkpoint import Checkpoint, identify
from inference.checkpoints.pipeline import load_pipeline, weight_bytes
from inference.checkpoints.quantization import Storage, is_quantized, quantize
from tests.support.models.ldm_layout import write_single_file
from tests.support.models.tiny_models import HIDDEN, build_tiny_z_image

MB = 1e6
SAMPLE_SECONDS = 0.001
STATUS = Path("/proc/self/status")
# Written to clear_refs, this sets the peak (VmHWM) back to what the process has now.
RESET_PEAK = "5"

SIZES = {
    "short": models.Size(512, (32, 64, 128, 128), 256, 4, (32, 64, 64, 64)),
    "1gb": models.Size(512, (192, 384, 512, 512), 512, 8, (64, 128, 256, 256), vae_layers_per_block=2),
}
# Width and number of Z-Image's layers.
TRANSFORMERS = {"short": (384, 8), "1gb": (1152, 25)}
TRANSFORMER = "transformer"


class Case(NamedTuple):
    """The dtype and the form of the weights on disk, and the dtype and WEIGHTS that they are loaded as."""

    disk: str
    form: str
    dtype: str
    storage: Storage = "auto"

    @property
    def name(self) -> str:
        quantized = "" if self.storage == "auto" else f", WEIGHTS={self.storage}"
        return f"{self.disk} {self.form} as {self.dtype}{quantized}"


CASES = (
    Case("float32", "folder", "float32"),
    Case("float32", "folder", "bfloat16"),
    Case("float32", "shards", "bfloat16"),
    Case("float32", "single file", "float32"),
    Case("float32", "single file", "bfloat16"),
    Case("float16", "folder", "float16"),
    Case("float16", "folder", "bfloat16"),
    Case("float16", "folder", "float32"),
    Case("bfloat16", TRANSFORMER, "bfloat16"),
    Case("bfloat16", TRANSFORMER, "bfloat16", "fp8"),
    Case("bfloat16", TRANSFORMER, "bfloat16", "nf4"),
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Loading:
    """Memory in MB and seconds of one load, beyond the process's baseline."""

    disk_mb: float
    memory_mb: float
    peak_all_mb: float
    peak_own_mb: float
    rest_all_mb: float
    rest_own_mb: float
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
        source, config, dtype, tiny, storage = arguments.child
        print(json.dumps(asdict(measure_here(source, config, dtype, tiny, storage))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = build(Path(folder), arguments.size)
        for case in CASES:
            results[case.name] = measure(sources, case)
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
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(folder: Path, size: str, cases: Sequence[Case] = CASES) -> Path:
    """Write the checkpoints as the cases need them, and a tiny one to warm up on; returns `folder`."""
    models.build("tiny", folder / "tiny", torch.float32)
    models.SIZES[size] = SIZES[size]
    for disk in {case.disk for case in cases}:
        forms = {case.form for case in cases if case.disk == disk}
        if TRANSFORMER in forms:
            _build_transformer(folder / f"{disk} {TRANSFORMER}", *TRANSFORMERS[size], DTYPES[disk])
        if "folder" in forms:
            whole = models.build(size, folder / f"{disk} folder", DTYPES[disk])
        if not forms.isdisjoint({"shards", "single file"}):
            pipe = load_pipeline(identify(str(whole), None), DTYPES[disk])
            pipe.save_pretrained(folder / f"{disk} shards", max_shard_size="200MB")
            write_single_file(folder / f"{disk} single file.safetensors", pipe)
    return folder


def _build_transformer(folder: Path, width: int, num_layers: int, dtype: torch.dtype) -> None:
    """Write a tiny Z-Image with a large transformer."""
    pipe = DiffusionPipeline.from_pretrained(build_tiny_z_image(folder))
    heads = width // 128
    sizes = {"dim": width, "n_layers": num_layers, "n_heads": heads, "n_kv_heads": heads, "cap_feat_dim": HIDDEN}
    torch.manual_seed(0)
    pipe.transformer = ZImageTransformer2DModel(in_channels=16, **sizes)
    pipe.to(dtype).save_pretrained(folder)


def measure(sources: Path, case: Case) -> Loading:
    """Load one of `build`'s checkpoints in a process of its own."""
    name, config = f"{case.disk} {case.form}", sources / f"{case.disk} folder"
    source = sources / (f"{name}.safetensors" if case.form == "single file" else name)
    child = [sys.executable, "-m", "benchmarks.loading", "--child", str(source), str(config), case.dtype]
    ended = subprocess.run(
        [*child, str(sources / "tiny"), case.storage],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Loading(**json.loads(ended.stdout.splitlines()[-1]))


def measure_here(source: str, config: str, dtype_name: str, tiny: str, storage: Storage = "auto") -> Loading:
    """Load in this process, after importing and warming the libraries."""
    dtype = DTYPES[dtype_name]
    _read(_load(identify(tiny, None), dtype, storage))

    checkpoint = identify(source, config)
    weights = weight_bytes(checkpoint, dtype.itemsize, storage)
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
        pipeline = _load(checkpoint, dtype, storage)
        loaded_at = time.perf_counter()
        _read(pipeline)
        ended_at = time.perf_counter()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    rest = _memory()
    return Loading(
        disk_mb=sum(file.stat().st_size for file in files) / MB,
        memory_mb=sum(weights.values()) / MB,
        peak_all_mb=(_memory().peak_bytes - before.all_bytes) / MB,
        peak_own_mb=(max(own_peak) - before.own_bytes) / MB,
        rest_all_mb=(rest.all_bytes - before.all_bytes) / MB,
        rest_own_mb=(rest.own_bytes - before.own_bytes) / MB,
        load_seconds=loaded_at - started_at,
        read_seconds=ended_at - loaded_at,
    )


def _load(checkpoint: Checkpoint, dtype: torch.dtype, storage: Storage) -> Any:
    pipeline = load_pipeline(checkpoint, dtype)
    if storage != "auto":
        quantize(pipeline, storage, torch.device("cpu"))
    return pipeline


def _read(pipeline: Any) -> None:
    """Touch every weight; those that were quantized have been written by now."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            for parameter in model.parameters():
                if not is_quantized(parameter):
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
    peaks = ("peak own", "ratio", "peak all", "ratio", "rest own", "rest all")
    table = Table("on disk, as", "disk MB", "memory MB", *peaks, "load s", "read s")
    for name, one in results.items():
        own = (f"{one.peak_own_mb:.0f}", f"{one.ratio_own:.2f}")
        everything = (f"{one.peak_all_mb:.0f}", f"{one.ratio_all:.2f}")
        seconds = (f"{one.load_seconds:.1f}", f"{one.read_seconds:.1f}")
        rest = (f"{one.rest_own_mb:.0f}", f"{one.rest_all_mb:.0f}")
        table.add_row(name, f"{one.disk_mb:.0f}", f"{one.memory_mb:.0f}", *own, *everything, *rest, *seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
