"""Put on a worker's PYTHONPATH: changes its modules as they are loaded, in the supervisor and in the engine alike.

FAULTS_STAND_IN   set: the engine is `tests.faults.stand_in`
FAULTS_CONSTANTS  JSON, {"module:NAME": value}: shorter timeouts where no setting has them; a list becomes a tuple
FAULTS_HOLD       "module:Class.function": each call touches FAULTS_FOLDER/reached and waits for FAULTS_FOLDER/go
FAULTS_ROOM       bytes of the device that several models share
FAULTS_CLOCK      a file with the seconds that `time.time` is wrong by; missing, it is right
FAULTS_NAMES      set: the kernel knows each thread's name, as from Python 3.14 on
"""

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

POLL_SECONDS = 0.01
PR_SET_NAME = 15

_changes: dict[str, list[Callable[[ModuleType], None]]] = defaultdict(list)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the real loader load a module, and changes it before the first import from it returns."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            for change in _changes[name]:
                change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _use_stand_in(module: ModuleType) -> None:
    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__(
                [part.replace("inference.process.child", "tests.faults.stand_in") for part in command], **options
            )

    own = ModuleType("subprocess")
    own.__dict__.update(vars(subprocess) | {"Popen": Popen})
    module.subprocess = own  # type: ignore[attr-defined]


def _set(name: str, value: Any, module: ModuleType) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    setattr(module, name, tuple(value) if isinstance(value, list) else value)


def _hold(path: str, module: ModuleType) -> None:
    owner_name, _, name = path.rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    function = getattr(owner, name)
    folder = Path(os.environ["FAULTS_FOLDER"])

    def held(*args: Any, **options: Any) -> Any:
        (folder / "reached").touch()
        while not (folder / "go").exists():
            time.sleep(POLL_SECONDS)
        return function(*args, **options)

    setattr(owner, name, held)


def _make_small(num_bytes: int, module: ModuleType) -> None:
    module.LocalEngine.__init__.__kwdefaults__["find_room"] = lambda _device: num_bytes


def _bend_clock(path: Path) -> None:
    right = time.time
    time.time = lambda: right() + (float(path.read_text()) if path.exists() else 0.0)


def _name_this_thread(*_event: Any) -> None:
    sys.setprofile(None)
    ctypes.CDLL(None).prctl(PR_SET_NAME, threading.current_thread().name.encode())


if "FAULTS_STAND_IN" in os.environ:
    _changes["inference.process.child_handle"].append(_use_stand_in)
for _place, _value in json.loads(os.environ.get("FAULTS_CONSTANTS", "{}")).items():
    _module, _, _name = _place.partition(":")
    _changes[_module].append(partial(_set, _name, _value))
if "FAULTS_HOLD" in os.environ:
    _module, _, _name = os.environ["FAULTS_HOLD"].partition(":")
    _changes[_module].append(partial(_hold, _name))
if "FAULTS_ROOM" in os.environ:
    _changes["inference.engine.local_engine"].append(partial(_make_small, int(os.environ["FAULTS_ROOM"])))
if "FAULTS_CLOCK" in os.environ:
    _bend_clock(Path(os.environ["FAULTS_CLOCK"]))
if "FAULTS_NAMES" in os.environ:
    threading.setprofile(_name_this_thread)
sys.meta_path.insert(0, _Finder())
