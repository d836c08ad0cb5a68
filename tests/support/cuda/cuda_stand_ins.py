"""A "cuda:0" in a torch without CUDA: a device guard, and replacements for what queries the driver."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import ROOT

GUARD_SOURCE = Path(__file__).parent / "cuda_guard.cpp"
BUILDS = ROOT / "build"
# Free and never less so: nothing is allocated.
MEMORY_BYTES = 140 * 10**9


class _NoStream:
    """A stream or an event of a device that has done everything before it is asked."""

    note_wait: Callable[[str], None]

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = record

    def synchronize(self) -> None:
        self.note_wait("wait")


def replacements(note_sync: Callable[[str], None]) -> Iterator[tuple[Any, str, Any]]:
    """Yield what of torch needs a real device before any operator runs, each with its replacement."""
    stream = type("Stream", (_NoStream,), {"note_wait": staticmethod(note_sync)})
    # torch lists once, for good, what `with torch.device(...)` applies to: the stand-ins must not be in that list.
    torch.utils._device._device_constructors()
    make_tensor = torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = make_tensor(*args, **kwargs)
        return made.pin_memory() if pin_memory else made

    yield torch, "tensor", tensor
    yield torch.cuda, "Stream", stream
    yield torch.cuda, "Event", stream
    yield torch.cuda, "stream", lambda _: nullcontext()
    yield torch.cuda, "current_stream", stream
    yield torch.cuda, "default_stream", stream
    yield torch.Tensor, "record_stream", lambda *_: None
    yield torch.cuda, "synchronize", lambda *_: note_sync("device")
    yield torch.cuda, "mem_get_info", lambda *_: (MEMORY_BYTES, MEMORY_BYTES)
    for counter in ("memory_allocated", "max_memory_allocated", "memory_reserved", "reset_peak_memory_stats"):
        yield torch.cuda, counter, lambda *_: 0
    # torch would swap the tensors in place, which it does not do to fake ones that anything refers to.
    yield torch.nn.Module, "_apply", _apply
    # What is done on Hopper alone is done here too.
    yield torch.cuda, "get_device_capability", lambda *_: (9, 0)


def _apply(
    module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], _: bool = True
) -> torch.nn.Module:
    """Apply as `Module._apply` does, with new parameters."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(function(weight), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)  # it was inherited
        else:
            setattr(owner, name, own)


@contextmanager
def guarded() -> Iterator[None]:
    """Register a CUDA device guard where torch has none, and remove it afterwards."""
    if torch.backends.cuda.is_built():  # its fake tensors see to it
        yield
        return
    library = _guard_library()
    before = library.exchange_cuda_guard(library.no_op_cuda_guard())
    try:
        yield
    finally:
        library.exchange_cuda_guard(before)


def why_not() -> str | None:
    """Return what is missing on this machine to run here; None: nothing."""
    if torch.backends.cuda.is_built() or shutil.which("g++"):
        return None
    return "fake CUDA tensors take a CUDA build of torch, or g++ to build a device guard for this one"


@cache
def _guard_library() -> Any:
    """Load the guard, built once for each version of its source and of torch."""
    version = hashlib.sha256(GUARD_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    path = BUILDS / f"cuda_guard-{version}.so"
    if not path.exists():
        _build_guard(path)
    library = ctypes.CDLL(str(path))
    library.no_op_cuda_guard.restype = ctypes.c_void_p
    library.exchange_cuda_guard.restype = ctypes.c_void_p
    library.exchange_cuda_guard.argtypes = [ctypes.c_void_p]
    return library


def _build_guard(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    home = Path(torch.__file__).parent
    # Test processes may build at the same time: each its own file, the last one stays.
    unfinished = path.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-I", str(home / "include"), str(GUARD_SOURCE)]
    subprocess.run([*command, "-L", str(home / "lib"), "-lc10", "-o", str(unfinished)], check=True)
    unfinished.replace(path)
